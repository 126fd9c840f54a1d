"""A fused TPU kernel for any mask and score modification, which never materialises the matrix of scores.

FlexAttention (Dong et al., 2412.05496) for JAX. Mask and score modification are the same Python functions that other
backends call; Pallas traces them into the kernel, on tiles of metadata (`flex_tiles.py`). EMPTY blocks of the block map
are neither computed nor fetched, and in FULL blocks the mask is not evaluated (`DECODER` takes a third of a tile's
instructions). Forward (`flex_forward.py`) and backward (`flex_backward.py`) use memory proportional to T + S. Like all
TPU kernels it is not partitioned by the compiler: on a mesh, call it inside `jax.shard_map`.

On CPU the kernel is interpreted, which is slow and meant for tests. There is no GPU version.
"""

import functools

import jax
import jax.numpy as jnp

from polygpt.attention.kernels import dispatch
from polygpt.attention.kernels.block_map import block_map
from polygpt.attention.kernels.flex_backward import backward
from polygpt.attention.kernels.flex_forward import forward
from polygpt.attention.kernels.flex_tiles import META_ROWS, OWN_ROWS, packed, unpacked
from polygpt.attention.kernels.problem import LOWEST, Operands, Rule
from polygpt.nn.remat import costly

BLOCK = 512
"""Default number of queries and keys per block."""
LANES = 128
"""Block sizes are multiples of this, the number of lanes of a TPU."""
VISITS = 2**17
"""Maximum number of blocks (rows x query blocks x key blocks) whose list fits into a TPU's scalar memory."""


def refuses(rule: Rule, operands: Operands) -> str | None:
    """Why it cannot compute this: a GPU, a dtype other than float32 and bfloat16, pair terms, many labels or blocks."""
    if dispatch.platform() == "gpu":
        return "its kernel is for TPUs; there is no Mosaic GPU version"
    for name, x in (("queries", operands.query_BHTd), ("keys", operands.key_BKSd), ("values", operands.value_BKSe)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} are {x.dtype}, but its kernel supports only float32 and bfloat16"
    if operands.terms.pair:
        return f"pair terms ({', '.join(operands.terms.pair)}) are arrays of T x S, which its kernel does not support"
    if len(labels := rule.mask.labels()) > META_ROWS - OWN_ROWS:
        return f"the mask reads {len(labels)} labels, but its kernel supports at most {META_ROWS - OWN_ROWS}"
    B, _, T, _ = operands.query_BHTd.shape
    S = operands.key_BKSd.shape[2]
    blocks = B * -(-T // default_block(rule, T)) * -(-S // default_block(rule, S))
    if blocks > VISITS:
        return f"{B} rows of {T} queries and {S} keys are {blocks} blocks, but it supports at most {VISITS}"
    return None


def attend(
    rule: Rule, operands: Operands, block_q: int | None = None, block_k: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`.

    Args:
        rule, operands: the problem.
        block_q, block_k: query and key block sizes; on TPU multiples of `LANES`.
    """
    T = operands.query_BHTd.shape[2]
    y_BHTe, lse_BH1T = _attend(rule, *_prepared(rule, operands, block_q, block_k))
    return y_BHTe[:, :, :T], lse_BH1T[:, :, 0, :T]


def gradients(
    rule: Rule,
    operands: Operands,
    lse_BHT: jax.Array,
    dy_BHTe: jax.Array,
    delta_BHT: jax.Array,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Operands:
    """The gradients' share that is due to these keys, see `problem.py`; blocks as in `attend`."""
    T, S = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2]
    block_q, block_k, interpret, whole, kind_BQK = _prepared(rule, operands, block_q, block_k)
    more = ((0, 0), (0, 0), (0, whole.query_BHTd.shape[2] - T))
    # Padding queries get zero weights: exp(score - lse) is 0.
    lse_BHT = jnp.pad(lse_BHT, more, constant_values=-LOWEST)
    dy_BHTe, delta_BHT = jnp.pad(dy_BHTe, (*more, (0, 0))), jnp.pad(delta_BHT, more)
    dquery, dkey, dvalue, dterms = backward(
        rule, block_q, block_k, interpret, whole, kind_BQK, lse_BHT[:, :, None], dy_BHTe, delta_BHT[:, :, None]
    )
    return Operands(dquery[:, :, :T], dkey[:, :, :S], dvalue[:, :, :S], None, None, unpacked(dterms, T, S))


def _prepared(rule, operands, block_q, block_k):
    """(block sizes, whether to interpret, packed operands, the block map)."""
    T, S = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2]
    block_q, block_k = block_q or default_block(rule, T), block_k or default_block(rule, S)
    whole = packed(operands.padded(-T % block_q, -S % block_k))
    kind_BQK = block_map(rule.mask, operands.query, operands.key, block_q, block_k)
    return block_q, block_k, dispatch.platform() == "cpu", whole, kind_BQK


def default_block(rule: Rule, count: int) -> int:
    """The default block size."""
    return dispatch.block() or min(BLOCK, -(-rule.block(count) // LANES) * LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(rule, block_q, block_k, interpret, operands, kind_BQK):
    return tuple(forward(rule, block_q, block_k, interpret, operands, kind_BQK))


def _attend_forward(rule, block_q, block_k, interpret, operands, kind_BQK):
    y_BHTe, lse_BH1T = costly(_attend(rule, block_q, block_k, interpret, operands, kind_BQK))
    return (y_BHTe, lse_BH1T), (operands, kind_BQK, y_BHTe, lse_BH1T)


def _attend_backward(rule, block_q, block_k, interpret, residuals, cotangents):
    operands, kind_BQK, y_BHTe, lse_BH1T = residuals
    dy_BHTe, dlse_BH1T = cotangents
    delta_BHT = jnp.sum(dy_BHTe.astype(jnp.float32) * y_BHTe.astype(jnp.float32), axis=-1)
    dquery, dkey, dvalue, dterms = backward(
        rule, block_q, block_k, interpret, operands, kind_BQK, lse_BH1T, dy_BHTe, delta_BHT[:, :, None, :] - dlse_BH1T
    )
    return Operands(dquery, dkey, dvalue, None, None, dterms), None


_attend.defvjp(_attend_forward, _attend_backward)
