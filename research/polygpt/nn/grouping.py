"""Positions brought to their experts and back: into buffers of a fixed size, or sorted with none left out.

Axis letters: k choices a position, N choices of all positions, E experts, C places of an expert in a row, F hidden
width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from polygpt.nn.grouped import grouped_matmul
from polygpt.nn.rearrange import rearrange
from polygpt.nn.router import Choice

# --- buffers of a fixed size ------------------------------------------------------------------------------------------


def places(expert_BTk: jax.Array, experts: int, capacity: int) -> jax.Array:
    """int32 [B, T, k]: each choice's place among the E C places of its row's buffers; E C where there is none left.

    Places are given away in the order of the positions, all choices of one before those of the next: what comes later
    in a row never takes a place from what comes earlier.
    """
    B, T, k = expert_BTk.shape
    flat_BN = expert_BTk.reshape(B, T * k)
    mine_BNE = flat_BN[..., None] == jnp.arange(experts, dtype=jnp.int32)[None, None]
    before_BNE = jnp.cumsum(mine_BNE, axis=1, dtype=jnp.int32) - 1
    before_BN = jnp.sum(jnp.where(mine_BNE, before_BNE, 0), axis=-1)
    kept_BN = (flat_BN < experts) & (before_BN < capacity)
    return jnp.where(kept_BN, flat_BN * capacity + before_BN, experts * capacity).reshape(B, T, k)


def through_buffers(
    x_BTD: jax.Array, choice: Choice, experts: int, capacity: int, function: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of what `function`, [B, E, C, D] to the same, makes of each position's places.

    Returns:
        float32 [B, T, D], 0 where no choice found a place; and the number of choices that found none.
    """
    B, T, k = choice.expert_BTk.shape
    place_BN = places(choice.expert_BTk, experts, capacity).reshape(B, T * k)
    nowhere = experts * capacity

    def source(place_N):  # of every place the choice that has it; T k, which is none, in empty ones
        return jnp.full(nowhere, T * k, jnp.int32).at[place_N].set(jnp.arange(T * k, dtype=jnp.int32), mode="drop")

    source_BP = jax.vmap(source)(place_BN)
    buffer_BPD = jax.vmap(rearrange)(jnp.repeat(x_BTD, k, axis=1), source_BP, place_BN)
    y_BECD = function(buffer_BPD.reshape(B, experts, capacity, -1))
    y_BND = jax.vmap(rearrange)(y_BECD.reshape(B, nowhere, -1), place_BN, source_BP)
    dropped = jnp.sum((choice.expert_BTk < experts) & (place_BN.reshape(B, T, k) == nowhere), dtype=jnp.float32)
    return combine(y_BND.reshape(B, T, k, -1), choice.weight_BTk), dropped


# --- sorted, none left out --------------------------------------------------------------------------------------------


def through_sorted(
    x_BTD: jax.Array, choice: Choice, experts: int, function: Callable[[jax.Array, Callable], jax.Array]
) -> jax.Array:
    """The weighted sum of what each position's experts make of it, float32 [B, T, D].

    `function(x_ND, grouped)` gets the choices sorted by expert, and `grouped(x, kernel_EDF)` to multiply each with its
    expert's matrix. Choices of no expert come last; they are zeros before and after.
    """
    B, T, k = choice.expert_BTk.shape
    expert_N = choice.expert_BTk.reshape(-1)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    inverse_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(B * T * k, dtype=jnp.int32), unique_indices=True)
    sizes_E = jnp.sum(expert_N[:, None] == jnp.arange(experts, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)

    def grouped(x_ND, kernel_EDF):
        return grouped_matmul(x_ND, kernel_EDF, sizes_E)

    sorted_ND = rearrange(jnp.repeat(x_BTD.reshape(B * T, -1), k, axis=0), order_N, inverse_N)
    y_ND = rearrange(function(sorted_ND, grouped), inverse_N, order_N)
    return combine(y_ND.reshape(B, T, k, -1), choice.weight_BTk)


def combine(y_BTkD: jax.Array, weight_BTk: jax.Array) -> jax.Array:
    """float32 [B, T, D]: the weighted sum over a position's choices."""
    return jnp.sum(y_BTkD.astype(jnp.float32) * weight_BTk[..., None], axis=2)
