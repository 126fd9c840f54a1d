"""Dispatch positions to experts and combine the results: through fixed-size buffers, or sorted and dropless.

Axis letters: k choices per position, N choices of all positions, E experts, C slots per expert and row, F hidden width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from polygpt.nn.grouped import grouped_matmul
from polygpt.nn.rearrange import rearrange
from polygpt.nn.remat import costly
from polygpt.nn.router import Routing

# --- fixed-size buffers -----------------------------------------------------------------------------------------------


def slots(expert_BTk: jax.Array, experts: int, capacity: int) -> jax.Array:
    """int32 [B, T, k]: each choice's slot among the E C slots of its row's buffers; E C if none is left.

    Slots are filled in order of position, all choices of one position before those of the next, so later positions
    never displace earlier ones.
    """
    B, T, k = expert_BTk.shape
    flat_BN = expert_BTk.reshape(B, T * k)
    mine_BNE = flat_BN[..., None] == jnp.arange(experts, dtype=jnp.int32)[None, None]
    before_BNE = jnp.cumsum(mine_BNE, axis=1, dtype=jnp.int32) - 1
    before_BN = jnp.sum(jnp.where(mine_BNE, before_BNE, 0), axis=-1)
    kept_BN = (flat_BN < experts) & (before_BN < capacity)
    return jnp.where(kept_BN, flat_BN * capacity + before_BN, experts * capacity).reshape(B, T, k)


def through_buffers(
    x_BTD: jax.Array, routing: Routing, experts: int, capacity: int, function: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Applies `function`, [B, E, C, D] -> [B, E, C, D], to the expert buffers and combines the results by position.

    Returns:
        The weighted sums, float32 [B, T, D], 0 where every choice was dropped; and the number of dropped choices.
    """
    B, T, k = routing.expert_BTk.shape
    slot_BN = slots(routing.expert_BTk, experts, capacity).reshape(B, T * k)
    no_slot = experts * capacity

    def source(slot_N):  # the choice in each slot; T k, which is out of range, in empty slots
        return jnp.full(no_slot, T * k, jnp.int32).at[slot_N].set(jnp.arange(T * k, dtype=jnp.int32), mode="drop")

    source_BS = jax.vmap(source)(slot_BN)
    buffer_BSD = jax.vmap(rearrange)(jnp.repeat(x_BTD, k, axis=1), source_BS, slot_BN)
    y_BECD = function(buffer_BSD.reshape(B, experts, capacity, -1))
    y_BND = jax.vmap(rearrange)(y_BECD.reshape(B, no_slot, -1), slot_BN, source_BS)
    dropped = jnp.sum((routing.expert_BTk < experts) & (slot_BN.reshape(B, T, k) == no_slot), dtype=jnp.float32)
    return combine(y_BND.reshape(B, T, k, -1), routing.weight_BTk), dropped


# --- sorted, dropless -------------------------------------------------------------------------------------------------


def through_sorted(
    x_BTD: jax.Array, routing: Routing, experts: int, function: Callable[[jax.Array, Callable], jax.Array]
) -> jax.Array:
    """The weighted sum of the outputs of each position's experts, float32 [B, T, D].

    `function(x_ND, grouped)` gets the inputs sorted by expert; `grouped(x, kernel_EDF)` multiplies each row by its
    expert's matrix. Choices of no expert (index E) come last; their rows are zero before and after.
    """
    B, T, k = routing.expert_BTk.shape
    expert_N = routing.expert_BTk.reshape(-1)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    inverse_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(B * T * k, dtype=jnp.int32), unique_indices=True)
    sizes_E = jnp.sum(expert_N[:, None] == jnp.arange(experts, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)

    def grouped(x_ND, kernel_EDF):
        return costly(grouped_matmul(x_ND, kernel_EDF, sizes_E))

    sorted_ND = rearrange(jnp.repeat(x_BTD.reshape(B * T, -1), k, axis=0), order_N, inverse_N)
    y_ND = rearrange(function(sorted_ND, grouped), inverse_N, order_N)
    return combine(y_ND.reshape(B, T, k, -1), routing.weight_BTk)


def combine(y_BTkD: jax.Array, weight_BTk: jax.Array) -> jax.Array:
    """float32 [B, T, D]: the weighted sum over a position's choices."""
    return jnp.sum(y_BTkD.astype(jnp.float32) * weight_BTk[..., None], axis=2)
