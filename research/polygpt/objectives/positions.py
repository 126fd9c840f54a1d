"""Functions of all logits of a position, for a block of positions at a time where `model.logits_block` says so.

The backward pass computes the logits of a block again (`jax.checkpoint`). Losses that depend on the scores of each
position alone do not need that: see `blocked.py`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from polygpt import sharding
from polygpt.objectives.blocked import blocks
from polygpt.objectives.forward import Forward


def per_position(function: Callable, passes: Sequence[Forward], used_BT: jax.Array, *arrays) -> jax.Array:
    """What `function` makes of each used position; 0 at the others, whose logits reach neither result nor gradient.

    Args:
        function: maps float32 logits [B, C, V] of each pass, and the arrays' [B, C, ...], to float32 [B, C].
        passes: forward passes over batches of one shape.
        used_BT: bool, the positions that count.
        arrays: arrays [B, T, ...].

    Returns:
        float32 [B, T].
    """
    block = passes[0].block
    if block is None:
        logits = (jnp.where(used_BT[..., None], one.logits_BTV.astype(jnp.float32), 0) for one in passes)
        return jnp.where(used_BT, function(*logits, *arrays), 0)
    B, T = shape = used_BT.shape
    layout = sharding.active()
    count = blocks(*(shape if layout is None else layout.local_shape(("batch", "positions"), shape)), block)[0]
    hidden = [jnp.where(used_BT[..., None], one.hidden_BTD, 0) for one in passes]

    def one_block(given):
        hidden, arrays = given
        logits = (one.model.logits(one.params, x_BCD) for one, x_BCD in zip(passes, hidden, strict=True))
        return function(*logits, *arrays)

    found = jax.lax.map(jax.checkpoint(one_block, prevent_cse=False), _split((hidden, arrays), count))
    return jnp.where(used_BT, jnp.moveaxis(found, 0, 2).reshape(B, -1)[:, :T], 0)


def log_probability(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The log-probability of the target, without the last axis of the logits; its gradient has no scatter."""
    at_target = jax.nn.one_hot(target, logits.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(at_target, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def _split(arrays, count: int):
    """[B, T, ...] -> [count, B, C, ...]: every count-th position, so that positions stay on their device."""

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % count), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 2, 0)

    return jax.tree.map(split, arrays)
