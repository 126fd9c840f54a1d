"""Many variants in one line: grids, everything with everything, in step, one after the other."""

import pytest

from polygpt.ablation.variants import chain, grid, product, united, zipped
from polygpt.errors import SpecError

WIDTH, RATE = grid("width", 8, 16), grid("rate", 0.1, 0.2)


def test_a_grid_names_values_by_themselves():
    assert grid("model.decoder.width", 8, 16) == {8: {"model.decoder.width": 8}, 16: {"model.decoder.width": 16}}
    assert grid("mlp.activation", "relu") == {"relu": {"mlp.activation": "relu"}}


def test_a_product_is_everything_with_everything():
    assert product(WIDTH, RATE) == {
        "8 + 0.1": {"width": 8, "rate": 0.1},
        "8 + 0.2": {"width": 8, "rate": 0.2},
        "16 + 0.1": {"width": 16, "rate": 0.1},
        "16 + 0.2": {"width": 16, "rate": 0.2},
    }
    assert list(product({"base": {}, "deep": {"depth": 2}}, WIDTH, {"adam": {}})) == [
        "base + 8 + adam",
        "base + 16 + adam",
        "deep + 8 + adam",
        "deep + 16 + adam",
    ]


def test_zipped_goes_in_step_under_the_first_names():
    assert zipped(WIDTH, grid("heads", 2, 4), RATE) == {
        8: {"width": 8, "heads": 2, "rate": 0.1},
        16: {"width": 16, "heads": 4, "rate": 0.2},
    }


def test_a_chain_is_one_after_the_other():
    assert chain({"base": {}}, WIDTH) == {"base": {}, 8: {"width": 8}, 16: {"width": 16}}


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: grid("mlp", object), "is not a name: write {name: {'mlp': value}, ...}"),
        (lambda: grid("bias", True), "True is not a name"),
        (lambda: grid("width", 8, 8), "grid('width'): duplicate name 8"),
        (lambda: product(WIDTH, WIDTH), "8 and 8 (part 1) both change width"),
        (lambda: product({"a": {"x": 1}}, {"b": {"y": 1}}, {"c": {"x": 2}}), "a + b and c (part 2) both change x"),
        (lambda: zipped(WIDTH, grid("rate", 0.1)), "zipped: 2 and 1 entries"),
        (lambda: zipped(WIDTH, WIDTH), "part 0 and part 1 both change width"),
        (lambda: chain(WIDTH, WIDTH), "chain: duplicate name 8"),
        (lambda: united({"variant 'x'": {"a": 1}, "width 8": {"a": 2}}), "variant 'x' and width 8 both change a"),
    ],
)
def test_what_does_not_fit_together_is_told(make, fault):
    with pytest.raises(SpecError) as raised:
        make()
    assert fault in str(raised.value)
