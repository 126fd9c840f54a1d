"""The backward kernels of `flex.py`: scores are recomputed tile by tile from the operands and the saved lse.

FlashAttention-2 (Dao, 2307.08691), algorithm 2, in two passes: one sums over keys for the gradients of queries and
heads, the other over queries for those of keys. With p = exp(s - lse) and the gradient of the weights g = dy v^T,

    ds = p (g - delta),    delta = sum_e dy y - dlse

(section 3.1; the last term is the gradient of lse itself). For the sigmoid, p = sigmoid(s) and ds = p (1 - p) g.
Automatic differentiation of the score modification turns ds into gradients of q k^T and of the terms.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polygpt.attention.kernels.block_map import FULL, PARTIAL
from polygpt.attention.kernels.flex_tiles import Place, Tile, Visits, along, as_row, dot, specs
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.scores import Terms


def backward(
    rule: Rule,
    block_q: int,
    block_k: int,
    interpret: bool,
    operands: Operands,
    kind_BQK: jax.Array,
    lse_BH1T: jax.Array,
    dy_BHTe: jax.Array,
    delta_BH1T: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Terms]:
    """Gradients of the query, the key, the value and the terms, in the shapes and dtypes of the packed operands."""
    settings = (rule, block_q, block_k, interpret, operands)
    saved = (lse_BH1T, dy_BHTe, delta_BH1T)
    dquery, of_query, of_head = _over_keys(*settings, kind_BQK, saved)
    dkey, dvalue, of_key = _over_queries(*settings, kind_BQK.swapaxes(1, 2), saved)
    return dquery, dkey, dvalue, Terms({name: jnp.sum(x, axis=0) for name, x in of_head.items()}, of_query, of_key)


def _over_keys(rule, block_q, block_k, interpret, operands, kind_BQK, saved):
    """Gradients of queries and their terms, and of head terms per row. The grid is (rows, heads, visits)."""
    B, H, T, d = operands.query_BHTd.shape
    visits = Visits.of(kind_BQK)

    def at(row, head, step, words):
        visit = visits.at(words, row, step)
        return Place(row, head, visit.outer, visit.inner)

    def per_head(x):  # stays in place while all visits of a row and head accumulate into it
        return pl.BlockSpec((None, None, *x.shape[1:]), lambda row, head, *_: (row, head, *(0 for _ in x.shape[1:])))

    inputs = specs(operands, block_q, block_k, at)
    head, query = operands.terms.head, operands.terms.query
    return pl.pallas_call(
        functools.partial(_over_keys_kernel, rule, visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H, visits.steps),
            in_specs=[inputs, _saved_specs(saved, block_q, at)],
            out_specs=[inputs.query_BHTd, inputs.terms.query, jax.tree.map(per_head, head)],
            scratch_shapes=[
                pltpu.VMEM((block_q, d), jnp.float32),
                {name: pltpu.VMEM((block_q, 1), jnp.float32) for name in query},
            ],
        ),
        out_shape=[
            _like(operands.query_BHTd),
            jax.tree.map(_like, query),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((B, *x.shape), x.dtype), head),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="flex_backward_query",
    )(visits.words, operands, saved)


def _over_keys_kernel(rule, visits, words, refs, saved, dquery_ref, of_query, of_head, dquery_sum, of_query_sum):
    step = pl.program_id(2)
    visit = visits.at(words, pl.program_id(0), step)

    @pl.when(step == 0)
    def start_head():
        _clear(of_head)

    @pl.when(visit.first)
    def start():
        _clear((dquery_sum, of_query_sum))

    def accumulate(masked):
        _, dproduct, dterms = _gradients(Tile.read(rule, masked, refs, query_axis=0), refs, saved, query_axis=0)
        key = refs.key_BKSd[...]
        dquery_sum[...] += dot(dproduct.astype(key.dtype), key, (1, 0))
        _add(of_query_sum, dterms.query)
        _add(of_head, dterms.head)

    pl.when(visit.kind == PARTIAL)(lambda: accumulate(masked=True))
    pl.when(visit.kind == FULL)(lambda: accumulate(masked=False))

    @pl.when(visit.last)
    def finish():
        dquery_ref[...] = dquery_sum[...].astype(dquery_ref.dtype)
        for name, ref in of_query.items():
            ref[...] = as_row(of_query_sum[name][...])


def _over_queries(rule, block_q, block_k, interpret, operands, kind_BKQ, saved):
    """Gradients of keys, values and key terms. The grid is (rows, key heads, visits, query heads per key head).

    Tiles are [keys, queries] here, so that no matrix needs a transposition before a product.
    """
    B, K, S, d = operands.key_BKSd.shape
    e = operands.value_BKSe.shape[3]
    group = operands.query_BHTd.shape[1] // K
    visits = Visits.of(kind_BKQ)

    def at(row, key_head, step, member, words):
        visit = visits.at(words, row, step)
        return Place(row, key_head * group + member, visit.inner, visit.outer)

    def of_group(x):  # the terms of all query heads of a key head, which share a visit
        return pl.BlockSpec((None, group, 1, block_k), lambda *at_: (at_[0], at_[1], 0, at(*at_).key))

    inputs = specs(operands, block_q, block_k, at)
    return pl.pallas_call(
        functools.partial(_over_queries_kernel, rule, visits, group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, visits.steps, group),
            in_specs=[inputs, _saved_specs(saved, block_q, at)],
            out_specs=[inputs.key_BKSd, inputs.value_BKSe, jax.tree.map(of_group, operands.terms.key)],
            scratch_shapes=[pltpu.VMEM((block_k, d), jnp.float32), pltpu.VMEM((block_k, e), jnp.float32)],
        ),
        out_shape=[_like(operands.key_BKSd), _like(operands.value_BKSe), jax.tree.map(_like, operands.terms.key)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="flex_backward_key",
    )(visits.words, operands, saved)


def _over_queries_kernel(rule, visits, group, words, refs, saved, dkey_ref, dvalue_ref, of_key, dkey_sum, dvalue_sum):
    member = pl.program_id(3)
    visit = visits.at(words, pl.program_id(0), pl.program_id(2))

    @pl.when(visit.first & (member == 0))
    def start():
        _clear((dkey_sum, dvalue_sum, of_key))

    def accumulate(masked):
        tile = Tile.read(rule, masked, refs, query_axis=1)
        weight, dproduct, dterms = _gradients(tile, refs, saved, query_axis=1)
        query, dy = refs.query_BHTd[...], saved[1][...]
        dkey_sum[...] += dot(dproduct.astype(query.dtype), query, (1, 0))
        dvalue_sum[...] += dot(weight.astype(dy.dtype), dy, (1, 0))
        for name, ref in of_key.items():
            ref[member] += as_row(dterms.key[name])

    pl.when(visit.kind == PARTIAL)(lambda: accumulate(masked=True))
    pl.when(visit.kind == FULL)(lambda: accumulate(masked=False))

    @pl.when(visit.last & (member == group - 1))
    def finish():
        dkey_ref[...] = dkey_sum[...].astype(dkey_ref.dtype)
        dvalue_ref[...] = dvalue_sum[...].astype(dvalue_ref.dtype)


def _gradients(tile: Tile, refs: Operands, saved, query_axis: int):
    """(weight, gradient of q k^T, gradients of the terms) of a tile."""
    lse_ref, dy_ref, delta_ref = saved
    dy, value = dy_ref[...], refs.value_BKSe[...]
    dweight = dot(dy, value, (1, 1)) if query_axis == 0 else dot(value, dy, (1, 1))

    def weight_and_slope(score):
        if tile.rule.normalizer == "sigmoid":
            weight = jax.nn.sigmoid(score)
            return weight, weight * (1 - weight) * dweight
        weight = jnp.exp(score - along(lse_ref[...], query_axis))
        return weight, weight * (dweight - along(delta_ref[...], query_axis))

    return tile.slopes(weight_and_slope)


def _saved_specs(saved, block_q, at):
    """Block specs of lse, dy and delta for the current queries."""

    def row(*indices):
        place = at(*indices)
        return place.row, place.head, 0, place.query

    def matrix(*indices):
        place = at(*indices)
        return place.row, place.head, place.query, 0

    numbers = pl.BlockSpec((None, None, 1, block_q), row)
    return numbers, pl.BlockSpec((None, None, block_q, saved[1].shape[3]), matrix), numbers


def _like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _clear(refs):
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros_like(ref)


def _add(refs, numbers):
    for name, ref in refs.items():
        ref[...] += numbers[name]
