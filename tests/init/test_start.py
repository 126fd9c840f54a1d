"""Which parameters of a source fill which of a model: names, shapes, and what is said when they do not fit."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from polygpt.errors import SpecError, UserError
from polygpt.init.base import Random, Weights
from polygpt.init.start import start
from polygpt.parameters import Traits

BYTES = {"class": "polygpt.data.tokenizers.bytes:Bytes", "multiple": 1}


class Arrays:
    """A source of float64 arrays in memory; each has values of its own."""

    origin = "arrays"

    def __init__(self, tokenizer=None, **shapes):
        self.tokenizer = tokenizer
        self.values = {
            name: np.arange(np.prod(shape)).reshape(shape) + 100.0 * i for i, (name, shape) in enumerate(shapes.items())
        }
        self.shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in self.values.items()}

    def read(self, wanted):
        return {name: jax.device_put(self.values[name].astype(x.dtype), x.sharding) for name, x in wanted.items()}


@dataclasses.dataclass(frozen=True)
class Given(Weights):
    def open(self):
        return SOURCE


SOURCE = Arrays(BYTES, **{"text/embed": (4, 2), "decoder/a": (2, 3), "decoder/b": (3,), "head/kernel": (2, 4)})
MODEL = {
    "text/embed": Traits((4, 2), ("vocabulary", "width"), decays=False),
    "decoder/a": Traits((2, 3), ("width", None), decays=True),
    "decoder/b": Traits((3,), (None,), decays=False),
    "head/kernel": Traits((2, 4), ("width", "vocabulary"), decays=True),
}
DIGITS = "adapters/digits/kernel"


def target(model=MODEL):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {name: jax.ShapeDtypeStruct(own.shape, np.float32, sharding=place) for name, own in model.items()}


def test_all_parameters_come_from_the_source_under_their_names():
    found = start(Given(), MODEL, BYTES).read(target())
    assert found.keys() == MODEL.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, SOURCE.values[name])
        assert value.dtype == np.float32


def test_random_parameters_need_no_source():
    found = start(Random(), MODEL, BYTES)
    assert found.read(target()) == {} and found.table == ""


def test_names_are_changed_in_order_and_selected_by_the_new_name():
    model = {
        "decoder/blocks/a": MODEL["decoder/a"],
        "decoder/blocks/b": MODEL["decoder/b"],
        "text/embed": MODEL["text/embed"],
    }
    init = Given(rename={r"^decoder/": "tower/", r"^tower/(\w)$": r"decoder/blocks/\1"}, include="blocks", exclude="b$")
    found = start(init, model, BYTES)
    assert found.taken == {"decoder/blocks/a": "decoder/a"}


def test_what_is_excluded_stays_random_here_and_unused_there():
    model = {name: own for name, own in MODEL.items() if name != "head/kernel"} | {
        DIGITS: Traits((5, 2), (None, None), True)
    }
    found = start(Given(exclude="^head/|^adapters/digits/"), model, BYTES)
    assert set(found.taken) == {"text/embed", "decoder/a", "decoder/b"}
    rows = [re.split(r" {2,}", line) for line in found.table.splitlines()[1:]]
    assert rows == [
        ["text", "text of arrays", "1", "8"],
        ["decoder", "decoder of arrays", "2", "9"],
        ["adapters/digits", "random", "1", "10"],
        ["not used", "head of arrays", "1", "8"],
    ]


@pytest.mark.parametrize(
    "init, model, words",
    [
        (
            Given(),
            MODEL | {DIGITS: Traits((5, 2), (None, None), True)},
            ["nothing in arrays fills", DIGITS, "init.exclude"],
        ),
        (
            Given(),
            {n: own for n, own in MODEL.items() if n != "decoder/b"},
            ["decoder/b of arrays fills nothing", "init.exclude"],
        ),
        (Given(), MODEL | {"decoder/a": Traits((2, 4), (None, None), True)}, ["[2, 3]", "[2, 4]", "decoder/a"]),
        (Given(strict=False), MODEL | {"decoder/b": Traits((4,), (None,), True)}, ["[3]", "[4]", "decoder/b"]),
        (Given(include="towers"), MODEL, ["takes nothing", "init.include"]),
        (Given(rename={"^decoder/.": "decoder/c"}), MODEL, ["decoder/a and decoder/b", "same name"]),
        (Given(rename={"decoder": r"\1"}), MODEL, ["init.rename", "decoder"]),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(init, model, words):
    with pytest.raises(UserError) as error:
        start(init, model, BYTES)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_without_strict_what_is_missing_stays_random_and_is_told():
    model = {name: own for name, own in MODEL.items() if name != "decoder/b"} | {
        DIGITS: Traits((5, 2), (None, None), True)
    }
    found = start(Given(strict=False), model, BYTES)
    assert set(found.taken) == {"text/embed", "decoder/a", "head/kernel"}
    assert re.search(r"^adapters/digits +random ", found.table, re.M) and re.search(
        "^not used +decoder of arrays", found.table, re.M
    )


def test_low_rank_updates_need_no_source_but_take_those_that_it_has():
    update = {"low_rank/decoder/a/up": Traits((1, 3), (None, None), True)}
    assert set(start(Given(), MODEL | update, BYTES).taken) == set(MODEL)
    with_some = {name: own for name, own in MODEL.items() if name != "decoder/b"} | update
    taken = start(
        Given(rename={"^decoder/b$": "low_rank/decoder/a/up"}),
        with_some | {"low_rank/decoder/a/up": MODEL["decoder/b"]},
        BYTES,
    )
    assert taken.taken["low_rank/decoder/a/up"] == "decoder/b"


@pytest.mark.parametrize("before", [None, "^text/"])
def test_the_pattern_that_the_error_proposes_is_a_remedy(before):
    model = {n: own for n, own in MODEL.items() if n != "head/kernel"} | {DIGITS: Traits((5, 2), (None, None), True)}
    with pytest.raises(UserError) as error:
        start(Given(exclude=before), model, BYTES)
    pattern = re.search(r"init.exclude '(.*?)' ", str(error.value))[1]
    text = set() if before else {"text/embed"}
    assert set(start(Given(exclude=pattern), model, BYTES).taken) == {"decoder/a", "decoder/b"} | text


@pytest.mark.parametrize("before", [None, "b$"])
def test_rows_of_another_tokenizer_are_refused_and_the_remedy_works(before):
    other = BYTES | {"multiple": 64}
    with pytest.raises(UserError, match="another tokenizer") as error:
        start(Given(exclude=before), MODEL, other)
    remedy = re.search(r"init.exclude to '(.*)'", str(error.value))[1]
    rest = set() if before else {"decoder/b"}
    assert set(start(Given(exclude=remedy), MODEL, other).taken) == {"decoder/a"} | rest


@pytest.mark.parametrize("field", [{"include": "("}, {"exclude": "["}, {"rename": {"(": ""}}])
def test_a_pattern_that_is_none_is_refused(field):
    with pytest.raises(SpecError, match=f"{next(iter(field))}.*regular expression"):
        Given(**field)


def test_what_stays_random_must_be_trained_beside_low_rank_updates():
    frozen = {name: dataclasses.replace(own, trained=False) for name, own in MODEL.items()}
    model = frozen | {"low_rank/decoder/a/up": Traits((1, 3), (None, None), True)}
    start(Given(), model, BYTES)
    new = {DIGITS: Traits((5, 2), (None, None), True, trained=False)}
    with pytest.raises(UserError, match="leaves adapters/digits/kernel random.*model.low_rank.also"):
        start(Given(exclude="digits"), model | new, BYTES)
    start(Given(exclude="digits"), model | {DIGITS: Traits((5, 2), (None, None), True)}, BYTES)
