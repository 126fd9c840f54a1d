"""`attention check` of variants that choose: by top-k, comparisons, zero weights, a table, and with what is ahead."""

import dataclasses

import jax.numpy as jnp
import pytest

from polygpt.api import MultiHead
from polygpt.attention.scores import Score
from polygpt.lab import check as lab
from polygpt.spec import load_class

OWN = __file__.replace("test_discrete", "discrete_variants")
CAUSAL, MASK, SPANS, PADDING = "causality", "mask honoured", "spans bidirectional", "padding without effect"

AHEAD = ["ThroughStoppedGradient", "ComparesAhead"]


def variant(name, **fields):
    return load_class(f"{OWN}:{name}")(**fields)


def checked(spec, *chosen):
    return {one.name: one for one in lab.check(spec, chosen=chosen)[1]}


@pytest.mark.parametrize("name", ["ReLUAttention", "TopKeys", "TopBlocks"])
def test_a_mask_may_be_an_upper_bound(name):
    found = checked(variant(name), CAUSAL, "segments isolated", MASK, SPANS, PADDING)
    assert [one.note for one in found.values() if one.passed is False] == []


def test_who_does_not_say_that_the_mask_is_a_bound_is_told_how():
    @dataclasses.dataclass(frozen=True)
    class Unsaid(type(variant("TopKeys"))):
        mask_is_bound = False

    (found,) = checked(Unsaid(), MASK).values()
    assert found.passed is False and "set mask_is_bound" in found.note


def test_a_bound_is_no_licence_to_see_nothing():
    @dataclasses.dataclass(frozen=True)
    class Blind(MultiHead):
        """Sees itself alone, and says that it may see all."""

        mask_is_bound = True

        def score(self, score):
            return super().score(score).then(ItselfAlone())

    found = checked(Blind(), MASK)[MASK]
    assert found.passed is False and "see no other one" in found.note


@dataclasses.dataclass(frozen=True)
class ItselfAlone(Score):
    """A mask, smuggled in as a score."""

    def __call__(self, score, query, key, terms):
        return jnp.where(query.index == key.index, score, -1e9)


def test_a_table_is_looked_up_under_every_transformation():
    found = checked(variant("TableLookup"), "vmap", "pmap")
    assert [one.result for one in found.values()] == ["pass"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ReLUAttention", "TopKeys", "TopBlocks", "TableLookup"])
def test_a_right_variant_that_chooses_passes_everything(name):
    found = checked(variant(name), *(one for one in lab.PROPERTIES if one != lab.TPU))
    assert [f"{one.name}: {one.note}" for one in found.values() if one.passed is False] == []


@pytest.mark.parametrize(
    "name",
    ["RouterAhead", "ExpertChoice", *(pytest.param(name, marks=pytest.mark.slow) for name in AHEAD)],
)
def test_what_no_gradient_shows_is_found_by_replacing_inputs(name):
    found = checked(variant(name), CAUSAL, MASK, SPANS)
    assert found[CAUSAL].passed is False and "replaced" in found[CAUSAL].note
    advice = " ".join(one.note for one in found.values())
    assert "sees_ahead" not in advice and "mask_is_bound" not in advice, "the fault is another"


def test_rotary_by_index_is_not_blamed_on_vectors_at_padding():
    found = checked(variant("RotaryByIndex"), PADDING)[PADDING]
    assert found.passed is False and "index instead of position" in found.note and "vectors" not in found.note


def test_vectors_at_padding_are_blamed_where_they_are_read():
    @dataclasses.dataclass(frozen=True)
    class Reads(type(load_class(OWN.replace("discrete", "wrong") + ":ReadsPadding")())):
        """Padding is read into the state, which does not fade there."""

        decay: float = 1.0
        """Nothing fades: zeros at padding change nothing."""

    found = checked(Reads(), PADDING)[PADDING]
    assert found.passed is False and found.note == "vectors at padding"


def test_plain_attention_passes_by_replacement_too():
    assert [one.result for one in checked(MultiHead(), CAUSAL, "segments isolated", MASK).values()] == ["pass"] * 3
