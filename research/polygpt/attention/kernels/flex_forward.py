"""The forward kernel of `flex.py`: online softmax over the non-EMPTY blocks of the block map.

FlashAttention-2 (Dao, 2307.08691), algorithm 1, with FlexAttention's mask and score functions evaluated on tiles (Dong
et al., 2412.05496).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polygpt.attention.kernels.block_map import FULL, PARTIAL
from polygpt.attention.kernels.flex_tiles import UNSEEN, Place, Tile, Visits, as_row, dot, specs
from polygpt.attention.kernels.problem import Operands, Rule


def forward(
    rule: Rule, block_q: int, block_k: int, interpret: bool, operands: Operands, kind_BQK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BH1T) of packed operands; T and S are multiples of the block sizes, `kind_BQK` is the block map.

    The grid is (rows, heads, visits): each block of queries stays in place for all its blocks of keys.
    """
    B, H, T, _ = operands.query_BHTd.shape
    value = operands.value_BKSe
    e = value.shape[3]
    visits = Visits.of(kind_BQK)

    def at(row, head, step, words):
        visit = visits.at(words, row, step)
        return Place(row, head, visit.outer, visit.inner)

    def result(*shape):
        def place(*indices):
            row, head, query, _ = at(*indices)
            return (row, head, query, 0) if shape[0] == block_q else (row, head, 0, query)

        return pl.BlockSpec((None, None, *shape), place)

    return pl.pallas_call(
        functools.partial(_kernel, rule, visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H, visits.steps),
            in_specs=[specs(operands, block_q, block_k, at)],
            out_specs=[result(block_q, e), result(1, block_q)],
            scratch_shapes=[
                pltpu.VMEM((block_q, 1), jnp.float32),
                pltpu.VMEM((block_q, 1), jnp.float32),
                pltpu.VMEM((block_q, e), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, e), value.dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="flex_forward",
    )(visits.words, operands)


def _kernel(rule, visits, words, refs, y_ref, lse_ref, greatest_ref, sum_ref, mixed_ref):
    """One visit. Scratch: the largest score so far, the sum of exp(score - largest), and the weighted sum of values."""
    visit = visits.at(words, pl.program_id(0), pl.program_id(2))

    @pl.when(visit.first)
    def start():
        greatest_ref[...] = jnp.full_like(greatest_ref, UNSEEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        mixed_ref[...] = jnp.zeros_like(mixed_ref)

    def accumulate(masked):
        score = Tile.read(rule, masked, refs, query_axis=0).score()
        value = refs.value_BKSe[...]
        if rule.normalizer == "sigmoid":
            mixed_ref[...] += dot(jax.nn.sigmoid(score).astype(value.dtype), value, (1, 0))
            return
        greatest = jnp.maximum(greatest_ref[...], jnp.max(score, axis=1, keepdims=True))
        weight = jnp.exp(score - greatest)
        shrunk = jnp.exp(greatest_ref[...] - greatest)
        sum_ref[...] = sum_ref[...] * shrunk + jnp.sum(weight, axis=1, keepdims=True)
        mixed_ref[...] = mixed_ref[...] * shrunk + dot(weight.astype(value.dtype), value, (1, 0))
        greatest_ref[...] = greatest

    pl.when(visit.kind == PARTIAL)(lambda: accumulate(masked=True))
    pl.when(visit.kind == FULL)(lambda: accumulate(masked=False))

    @pl.when(visit.last)
    def finish():
        if rule.normalizer == "sigmoid":
            y_ref[...] = mixed_ref[...].astype(y_ref.dtype)
            lse_ref[...] = jnp.zeros_like(lse_ref)
            return
        total = jnp.where(sum_ref[...] == 0, 1.0, sum_ref[...])  # if no key was visible: y = 0, lse = UNSEEN
        y_ref[...] = (mixed_ref[...] / total).astype(y_ref.dtype)
        lse_ref[...] = as_row(greatest_ref[...] + jnp.log(total))
