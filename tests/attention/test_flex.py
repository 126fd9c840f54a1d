"""flex: interpreted on the CPU against float64, compiled for TPUs ahead of time, and what it visits and refuses."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import NAMES, Gates, Slopes, Table, answers, assert_agrees, cotangents, problem

from polygpt import topology
from polygpt.attention.kernels import dispatch, flex
from polygpt.attention.kernels.block_map import EMPTY, FULL, PARTIAL, block_map
from polygpt.attention.kernels.flex_tiles import Visits
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, Blockwise, Causal, Dilated, QueryModality, SameSegment, Sinks
from polygpt.attention.meta import Meta
from polygpt.attention.scores import Score, SoftCap, Terms

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
attend = functools.partial(flex.attend, block_q=8, block_k=8)
attend_wide = functools.partial(flex.attend, block_q=8, block_k=16)
QUICK = ("plain", "spans", "labels", "table", "gates", "sigmoid_terms")
"""Between them every kind of block and term, both normalizers, MHA, GQA and MQA, padding, unequal lengths."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_equals_float64_with_gradients(name):
    assert_agrees(attend, *problem(name))


@pytest.mark.parametrize("name", ["spans", pytest.param("table", marks=pytest.mark.slow)])
def test_bfloat16(name):
    assert_agrees(attend_wide, *problem(name, dtype="bfloat16"))


def test_one_block_of_the_usual_size_is_enough_for_all():
    rule, operands = problem("slopes")
    assert_agrees(flex.attend, rule, operands, gradients=False)


def test_the_problems_have_blocks_of_every_kind():
    def kinds(name):
        rule, operands = problem(name)
        return set(np.unique(block_map(rule.mask, operands.query, operands.key, 8, 8)).tolist())

    assert kinds("plain") == {EMPTY, PARTIAL, FULL} and EMPTY in kinds("gates")


def test_what_lies_in_empty_blocks_is_never_looked_at():
    """NaN there would spread from the first product: into sums over keys, and into gradients of queries."""
    rule, operands = problem("gates")
    empty = np.asarray(block_map(rule.mask, operands.query, operands.key, 8, 8) == EMPTY)
    dark = np.repeat(empty.all(axis=1), 8, axis=1)[:, None, : operands.key_BKSd.shape[2], None]
    assert 0 < dark.sum() < dark.size  # keys of blocks that are EMPTY for all queries
    spoilt = dataclasses.replace(
        operands,
        key_BKSd=jnp.where(dark, jnp.nan, operands.key_BKSd),
        value_BKSe=jnp.where(dark, jnp.nan, operands.value_BKSe),
    )
    given = cotangents(operands)
    for a, b in zip(
        jax.tree.leaves(answers(attend, rule, spoilt, *given)),
        jax.tree.leaves(answers(attend, rule, operands, *given)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_every_block_that_is_not_empty_is_visited_once_and_each_result_is_written():
    kind = np.random.default_rng(0).choice([EMPTY, EMPTY, PARTIAL, FULL], size=(3, 4, 5))
    kind[0, 2] = kind[2] = EMPTY
    visits = Visits.of(jnp.asarray(kind, jnp.int8))
    done, most = [], 0
    for row in range(3):
        wanted = []
        for outer in range(4):
            inner = np.flatnonzero(kind[row, outer] != EMPTY)
            inner = inner if len(inner) else np.array([0])
            for n, i in enumerate(inner):
                wanted.append((outer, i, n == 0, n == len(inner) - 1, kind[row, outer, i]))
        most = max(most, len(wanted))
        got = [tuple(int(x) for x in visits.at(visits.words, row, step)) for step in range(20)]
        assert got[: len(wanted)] == wanted
        # It waits at its last block with nothing to do.
        assert set(got[len(wanted) :]) == {(*wanted[-1][:2], 0, 0, EMPTY)}
        done.append(len(wanted))
    assert int(visits.steps) == max(done) == most


def test_what_it_refuses():
    rule, operands = problem("plain")
    assert flex.refuses(rule, operands) is None
    with dispatch.compiling_for("gpu"):
        assert "no Mosaic GPU version" in flex.refuses(rule, operands)
    with dispatch.compiling_for("tpu"):
        assert flex.refuses(rule, operands) is None
    half = dataclasses.replace(operands, value_BKSe=operands.value_BKSe.astype(jnp.float16))
    assert "values are float16" in flex.refuses(rule, half)
    assert "pair terms (both)" in flex.refuses(*problem("pairs"))
    long = shapes(8, 1, 1, 2**17)
    assert "it supports at most 131072" in flex.refuses(rule, long) and "131072 queries" in flex.refuses(rule, long)


def shapes(B: int, H: int, K: int, T: int, width: int = 128, dtype="bfloat16", **terms) -> Operands:
    """A problem without numbers."""
    meta = jax.eval_shape(lambda: Meta.empty(B, T))
    of = {kind: {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in terms.get(kind, {}).items()} for kind in KINDS}
    arrays = (jax.ShapeDtypeStruct((B, heads, T, width), dtype) for heads in (H, K, K))
    return Operands(*arrays, meta, meta, Terms(**of))


KINDS = ("head", "query", "key")


def compiled(name: str, rule: Rule, operands: Operands) -> jax.stages.Compiled:
    """Forward and backward, for one device of the TPU slice called `name`."""

    def results(operands, floats):
        def total(floats):
            y_BHTe, lse_BHT = flex.attend(rule, dataclasses.replace(operands, **floats))
            return jnp.sum(y_BHTe.astype(jnp.float32)) + jnp.sum(lse_BHT)

        return jax.value_and_grad(total)(floats)

    floats = {name: getattr(operands, name) for name in ("query_BHTd", "key_BKSd", "value_BKSe", "terms")}
    with dispatch.compiling_for("tpu"):
        return topology.compile_for(name, results, operands, floats)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, normalizer",
    [("v4:2x2x1", "softmax"), ("v5e:2x2", "softmax"), ("v5p:2x2x1", "softmax"), ("v6e:2x2", "softmax")]
    + [("v5e:2x2", "sigmoid")],
)
def test_it_compiles_for_a_tpu_with_every_kind_of_term(name, normalizer):
    mask = SameSegment() & Causal() & (Dilated(3, 8) | Sinks(4) | Blockwise(16, 1) & ~QueryModality(1))
    score = Gates().then(Slopes()).then(Table()).then(SoftCap(20.0))
    B, H, K, T = 2, 4, 2, 300
    terms = {
        "head": {"first.first.second.slope": (H,), "first.second.table": (4, H)},
        "query": {"first.first.first.gate": (B, H, T)},
        "key": {"first.first.first.gate": (B, H, T)},
    }
    text = compiled(name, Rule(mask, score, normalizer), shapes(B, H, K, T, 64, **terms)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    for kernel in ("flex_forward", "flex_backward_query", "flex_backward_key"):
        assert kernel in text


@needs_libtpu
@pytest.mark.slow
def test_its_memory_on_a_tpu_is_linear_in_the_length():
    """At lengths at which it no longer fits beside other buffers: arguments, results and temporaries all double."""
    taken = []
    for T in (8192, 16_384, 32_768):
        memory = compiled("v5e:2x2", Rule(DECODER), shapes(4, 16, 4, T)).memory_analysis()
        parts = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
        print(T, *(f"{part / 1e6:.1f} MB" for part in parts))
        taken.append(parts)
    for before, after in zip(taken, taken[1:], strict=False):
        assert all(1.9 * one < two < 2.1 * one for one, two in zip(before, after, strict=True))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 192])
def test_it_compiles_for_a_tpu_in_float32_and_at_odd_widths(width):
    text = compiled("v5e:2x2", Rule(DECODER, Score()), shapes(1, 2, 1, 1100, width, "float32")).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@dataclasses.dataclass(frozen=True)
class Divided(Score):
    """The score over a number of the query and of the key: not finite where that is 0."""

    def __call__(self, score, query, key, terms):
        return score / (terms.query["by"] * terms.key["by"])


def test_padding_of_a_block_calls_a_score_with_no_terms_that_no_position_has():
    rule, operands = problem("plain")
    B, H, T, _ = operands.query_BHTd.shape
    S = operands.key_BKSd.shape[2]
    assert T % 8 or S % 8
    operands = dataclasses.replace(
        operands, terms=Terms(query={"by": jnp.full((B, H, T), 2.0)}, key={"by": jnp.full((B, H, S), 3.0)})
    )
    given = cotangents(operands)
    for leaf in jax.tree.leaves(answers(attend, dataclasses.replace(rule, score=Divided()), operands, *given)):
        assert np.isfinite(leaf).all()
