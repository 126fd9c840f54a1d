"""`attention check` of mistakes that one size, short rows, equal heads and Rope hide; right variants beside them."""

import dataclasses

import pytest

from polygpt.attention.forgetting import Forgetting
from polygpt.lab import check as lab
from polygpt.spec import load_class

OWN = __file__.replace("test_long", "long_variants")
SIZE, GROUPS, ALIBI = "row and cache of any size", "grouped heads", "ALiBi as well as Rope"
WEIGHTS, LEARNS, APART = "weights are those of the output", "every parameter learns", "positions told apart"
LONG_CACHE, NARROW = "full cache = no cache, long rows", "long rows in bfloat16"
HONOURED = "mask honoured in long rows"
MISTAKES = {
    "SharperInLongArrays": (SIZE, "the size of the row"),
    "ClampedPositions": (APART, "does not"),
    "TiledHeads": (GROUPS, "kv_heads 2, full cache"),
    "OtherPictures": (WEIGHTS, "weigh()"),
    "NeverLearns": (LEARNS, "forgotten"),
    "NamesTermsItself": (ALIBI, "KeyError"),
    "ForgetsToRescale": (LONG_CACHE, "from position 130 on"),
    "SumsInBfloat16": (NARROW, "float32"),
}
"""By variant, the property that fails, and a word of its note."""
SHORT = ["full cache = no cache", "padding without effect", "bfloat16 near float32"]
"""What none of them fails: with short rows all seems well."""
QUICK = ["ClampedPositions", "OtherPictures", "NeverLearns", "SharperInLongArrays", "SumsInBfloat16"]


def failing(name, *chosen, **fields):
    return failing_of(load_class(f"{OWN}:{name}")(**fields), *chosen)


def failing_of(spec, *chosen):
    _, findings = lab.check(spec, chosen=chosen)
    return {one.name: one.note for one in findings if one.passed is False}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MISTAKES])
def test_a_mistake_that_short_rows_hide_is_called_by_its_name(name):
    guilty, word = MISTAKES[name]
    found = failing(name, guilty)
    assert list(found) == [guilty] and word in found[guilty]


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_the_other_properties_do_not_blame_it(name):
    assert failing(name, *SHORT) == {}


def test_sums_in_float32_pass_over_long_rows():
    assert failing("SumsInBfloat16", NARROW, wide=True) == {}


@pytest.mark.slow
def test_gates_that_close_the_mask_are_shown_the_field_that_allows_it():
    @dataclasses.dataclass(frozen=True)
    class Undeclared(Forgetting):
        mask_is_bound = False

    (finding,) = lab.check(Undeclared(), chosen=[HONOURED])[1]
    assert finding.passed is False and "gates" in finding.note and "mask_is_bound = True" in finding.note
    assert failing_of(Forgetting(), HONOURED) == {}


@pytest.mark.slow
def test_right_variants_pass_all_of_them():
    chosen = [SIZE, GROUPS, ALIBI, WEIGHTS, LEARNS, APART, LONG_CACHE, NARROW, HONOURED]
    _, findings = lab.check(load_class("polygpt.attention.multi_head:MultiHead")(), chosen=chosen)
    assert [one.result for one in findings] == ["pass"] * len(chosen)
