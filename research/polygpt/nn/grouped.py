"""Grouped matrix multiplication: rows sorted by group, one matrix per group.

Axis letters: N rows, E groups, D and F widths, n blocks of b rows.
"""

import jax
import jax.numpy as jnp

from polygpt.nn.rearrange import rearrange


@jax.custom_vjp
def grouped_matmul(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[N, F]: the first `sizes_E[0]` rows times the first matrix, and so on; rows after the last group give zeros.

    Uses `jax.lax.ragged_dot` except on CPU, where that multiplies every row by every matrix. On CPU the rows are laid
    out in blocks of one group each, the scheme of MegaBlocks (Gale et al., 2211.15841), section 5.
    """
    y_NF = jax.lax.platform_dependent(x_ND, kernel_EDF, sizes_E, cpu=_in_blocks, default=jax.lax.ragged_dot)
    return _grouped_rows(y_NF, sizes_E)  # `ragged_dot` leaves the rows after the last group undefined


def _forward(x_ND, kernel_EDF, sizes_E):
    return grouped_matmul(x_ND, kernel_EDF, sizes_E), (x_ND, kernel_EDF, sizes_E)


def _backward(arguments, y_NF):
    x_ND, kernel_EDF, sizes_E = arguments
    towards_x_ND = grouped_matmul(y_NF, kernel_EDF.swapaxes(1, 2), sizes_E)
    towards_kernel_EDF = jax.lax.platform_dependent(
        _grouped_rows(x_ND, sizes_E), _grouped_rows(y_NF, sizes_E), sizes_E, cpu=_outer_in_blocks, default=_outer
    )
    return towards_x_ND, towards_kernel_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _grouped_rows(x_ND, sizes_E):
    return jnp.where((jnp.arange(len(x_ND)) < jnp.sum(sizes_E))[:, None], x_ND, 0)


def _outer(x_ND, y_NF, sizes_E):
    """[E, D, F]: for each group, the sum of the outer products of its rows."""
    contracted = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return jax.lax.ragged_dot_general(x_ND, y_NF, sizes_E, contracted)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _in_blocks(x_ND, kernel_EDF, sizes_E):
    source_P, place_N, expert_n = _blocks(len(x_ND), sizes_E)
    x_nbD = rearrange(x_ND, source_P, place_N).reshape(len(expert_n), -1, x_ND.shape[1])

    def multiply(block):
        x_bD, expert = block
        return x_bD @ jax.lax.dynamic_index_in_dim(kernel_EDF, expert, 0, False)

    y_nbF = jax.lax.map(multiply, (x_nbD, expert_n))
    return rearrange(y_nbF.reshape(-1, y_nbF.shape[-1]), place_N, source_P)


def _outer_in_blocks(x_ND, y_NF, sizes_E):
    source_P, place_N, expert_n = _blocks(len(x_ND), sizes_E)
    x_nbD, y_nbF = (rearrange(x, source_P, place_N).reshape(len(expert_n), -1, x.shape[1]) for x in (x_ND, y_NF))

    def add(sums_EDF, block):
        x_bD, y_bF, expert = block
        return sums_EDF.at[expert].add(x_bD.T @ y_bF), None

    zeros_EDF = jnp.zeros((len(sizes_E), x_ND.shape[1], y_NF.shape[1]), x_ND.dtype)
    return jax.lax.scan(add, zeros_EDF, (x_nbD, y_nbF, expert_n))[0]


def _blocks(rows: int, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The row at each slot of the blocks, the slot of each row, and the group of each block.

    An empty slot has row N; a row after the last group has a slot out of range.
    """
    E = len(sizes_E)
    size = min(128, max(8, rows // E))
    blocks = rows // size + E  # an upper bound: the last block of each group may be partly empty
    ends_E, padded_E = jnp.cumsum(sizes_E), jnp.cumsum(-(-sizes_E // size) * size)
    row_N = jnp.arange(rows, dtype=jnp.int32)
    group_N = jnp.searchsorted(ends_E, row_N, side="right")
    shift_E = jnp.concatenate([jnp.zeros(1, ends_E.dtype), (padded_E - ends_E)[:-1]])
    place_N = row_N + jnp.take(shift_E, group_N, mode="fill", fill_value=blocks * size)
    source_P = jnp.full(blocks * size, rows, jnp.int32).at[place_N].set(row_N, mode="drop")
    starts_n = jnp.arange(blocks, dtype=jnp.int32) * size
    return source_P, place_N, jnp.minimum(jnp.searchsorted(padded_E, starts_n, side="right"), E - 1)
