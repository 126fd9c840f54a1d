"""The memory of softmax attention while a model generates: keys, values and whatever else has a position.

Two forms, with the same results. A full cache has a place for every position. A ring has places for what the mask can
reach alone, the first positions of an example and its last ones, and new positions take the places of those that have
gone out of reach: its size does not grow with the text. It is addressed by position id and row by row, so that the
padding of a short prompt takes no place in it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.attention.masks import Mask, Meta, Reach
from polygpt.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full:
    """All positions, in the order in which they were read.

    Attributes:
        arrays: a pytree of [B, ., S, ...].
    """

    arrays: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """The positions within reach.

    Attributes:
        arrays: a pytree of [B, ., R, ...]: R is the sum of both halves of the reach.
        meta: metadata of what is held, [B, R]; segment 0 where nothing is.
        reach: how many first and last positions of an example are held.
    """

    arrays: Any
    meta: Meta
    reach: Reach = dataclasses.field(metadata={"static": True})


def empty(arrays: Any, size: int, mask: Mask, ring: bool = True) -> Full | Ring:
    """A cache for `size` positions.

    Args:
        arrays: a pytree of the shapes and dtypes of one position, [B, ., 1, ...].
        size: S, the positions that a row may have.
        mask: what queries see; where its reach is less than `size` the cache is a ring.
        ring: whether it may be one.
    """
    reach = mask.reach()
    fits = ring and reach is not None and reach.first + reach.last < size
    size = reach.first + reach.last if fits else size

    def zeros(x):
        return jnp.zeros((*x.shape[:2], size, *x.shape[3:]), x.dtype)

    arrays = jax.tree.map(zeros, arrays)
    if not fits:
        return Full(arrays)
    rows = jax.tree.leaves(arrays)[0].shape[0]
    return Ring(arrays, Meta(*(jnp.zeros((rows, size), jnp.int32) for _ in range(5))), reach)


def extend(cache: Full | Ring | None, new: Any, context) -> tuple[Any, Meta, Full | Ring | None]:
    """Adds positions and says what queries may look at.

    Args:
        cache: what was read before, or None: nothing was, and nothing is to be remembered.
        new: a pytree of [B, ., T, ...], of the positions `context.query`.
        context: a `contract.Context`.

    Returns:
        (a pytree of [B, ., S, ...], its metadata [B, S], the cache with the new positions in it).
    """
    if cache is None:
        return new, context.key, None
    new = jax.tree.map(_split, new)
    if isinstance(cache, Full):

        def write(old, new):
            return _split(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.cursor, axis=2))

        arrays = jax.tree.map(write, cache.arrays, new)
        return arrays, context.key, Full(arrays)
    # Old and new side by side: a query among many new ones may still see what the later of them overwrite.
    new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, cache.arrays)
    seen = jax.tree.map(lambda old, x: jnp.concatenate([old, x], axis=2), cache.arrays, new)
    meta = jax.tree.map(lambda old, x: jnp.concatenate([old, x], axis=1), cache.meta, context.query)
    source_BR, fresh_BR = _latest(cache, context.query)

    def keep(old, x):
        shape = (*source_BR.shape[:1], 1, source_BR.shape[1], *[1] * (x.ndim - 3))
        taken = jnp.take_along_axis(x, source_BR.reshape(shape), axis=2)
        return _split(jnp.where(fresh_BR.reshape(shape), taken, old))

    def keep_meta(old, x):
        return jnp.where(fresh_BR, jnp.take_along_axis(x, source_BR, axis=1), old)

    arrays = jax.tree.map(keep, cache.arrays, new)
    return seen, meta, Ring(arrays, jax.tree.map(keep_meta, cache.meta, context.query), cache.reach)


def last(cache: Full | Ring | None, context, name: str) -> tuple[Any, jax.Array] | None:
    """What is remembered of the last position of each row that is no padding.

    Args:
        cache: what was read before the positions `context.query`.
        context: a `contract.Context`.
        name: of the part of what is remembered.

    Returns:
        (a pytree of [B, ., 1, ...], the segments of the positions, int32 [B], 0 where there is none); None where
        nothing of that name is remembered.
    """
    if cache is None or not jax.tree.leaves(cache.arrays[name]):
        return None
    if isinstance(cache, Full):
        segment_BS, order_BS = context.key.segment, jnp.arange(context.key.segment.shape[1], dtype=jnp.int32)[None]
        read_BS = (segment_BS > 0) & (order_BS < context.cursor)
    else:
        segment_BS, order_BS = cache.meta.segment, cache.meta.index
        read_BS = segment_BS > 0
    place_B1 = jnp.argmax(jnp.where(read_BS, order_BS, -1), axis=1, keepdims=True)
    last_B = jnp.where(read_BS.any(axis=1), jnp.take_along_axis(segment_BS, place_B1, axis=1)[:, 0], 0)

    def taken(x):
        return jnp.take_along_axis(x, place_B1.reshape(-1, 1, 1, *[1] * (x.ndim - 3)), axis=2)

    return jax.tree.map(taken, cache.arrays[name]), last_B


def _split(x: jax.Array) -> jax.Array:
    """[B, ., S, ...] over the devices that have its rows and heads; positions whole, since each step writes to one."""
    return constrain(x, "batch", "kv_heads", *[None] * (x.ndim - 2))


def _latest(cache: Ring, query: Meta) -> tuple[jax.Array, jax.Array]:
    """For each place of the ring the last new position that belongs there, [B, R], and whether there is one.

    The first positions of an example have places of their own; the others take turns in the rest.
    """
    first, last = cache.reach.first, cache.reach.last
    B, T = query.position.shape
    turn_BT = first + (query.position - first) % last if last else jnp.full_like(query.position, first)
    place_BT = jnp.where(query.position < first, query.position, turn_BT)
    place_BT = jnp.where(query.segment > 0, place_BT, first + last)  # padding has no place
    order_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    newest_BR = jnp.full((B, first + last), -1, jnp.int32)
    newest_BR = newest_BR.at[jnp.arange(B)[:, None], place_BT].max(order_BT, mode="drop")
    return jnp.maximum(newest_BR, 0), newest_BR >= 0
