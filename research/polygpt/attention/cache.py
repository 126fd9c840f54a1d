"""The cache of softmax attention for generation: keys, values and any other arrays per position.

There are two forms with the same results. A full cache has a slot for every position. A ring buffer has slots only for
positions within the reach of the mask, the first and the last ones of an example, and new positions overwrite those out
of reach: its size does not grow with the text. It is addressed per row by position id, so the padding of a short prompt
takes no slots.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.attention.masks import Mask, Reach
from polygpt.attention.meta import Meta
from polygpt.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full:
    """All positions, in reading order.

    Attributes:
        arrays: a pytree of [B, ., S, ...].
    """

    arrays: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """The positions within reach.

    Attributes:
        arrays: a pytree of [B, ., R, ...], R = reach.first + reach.last.
        meta: metadata of the slots, [B, R]; segment 0 in empty slots.
        reach: the numbers of first and last positions of an example to keep.
    """

    arrays: Any
    meta: Meta
    reach: Reach = dataclasses.field(metadata={"static": True})


def empty(arrays: Any, size: int, mask: Mask, ring: bool = True) -> Full | Ring:
    """A cache for `size` positions.

    Args:
        arrays: a pytree of the shapes and dtypes of one position, [B, ., 1, ...].
        size: S, the maximum number of positions per row.
        mask: the mask; if its reach is less than `size`, the cache is a ring buffer.
        ring: whether to allow a ring buffer.
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
    return Ring(arrays, Meta.empty(rows, size, mask.labels()), reach)


def extend(cache: Full | Ring | None, new: Any, context) -> tuple[Any, Meta, Full | Ring | None]:
    """Adds positions to the cache and returns everything that queries may attend to.

    Args:
        cache: the earlier positions, or None to use no cache.
        new: a pytree of [B, ., T, ...] for the positions `context.query`.
        context: a `contract.Context`.

    Returns:
        (a pytree of [B, ., S, ...], its metadata [B, S], the updated cache).
    """
    if cache is None:
        return new, context.key, None
    new = jax.tree.map(_split, new)
    if isinstance(cache, Full):

        def write(old, new):
            return _split(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.cursor, axis=2))

        arrays = jax.tree.map(write, cache.arrays, new)
        return arrays, context.key, Full(arrays)
    new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, cache.arrays)
    query = context.query.only(cache.meta.extra)
    place_BT = _places(cache.reach, query)
    if place_BT.shape[1] == 1:  # what a single position overwrites is out of its reach
        arrays = jax.tree.map(lambda old, x: _split(_put(old, x, place_BT[:, 0], 1)), cache.arrays, new)
        meta = jax.tree.map(lambda old, x: _put(old, x, place_BT[:, 0], 0), cache.meta, query)
        return arrays, meta, Ring(arrays, meta, cache.reach)
    # Attend to old and new positions together: an early query may still see slots that later positions overwrite.
    seen = jax.tree.map(lambda old, x: jnp.concatenate([old, x], axis=2), cache.arrays, new)
    meta = jax.tree.map(lambda old, x: jnp.concatenate([old, x], axis=1), cache.meta, query)
    source_BR, fresh_BR = _latest(place_BT, cache.meta.index.shape[1])

    def keep(old, x):
        shape = (*source_BR.shape[:1], 1, source_BR.shape[1], *[1] * (x.ndim - 3))
        taken = jnp.take_along_axis(x, source_BR.reshape(shape), axis=2)
        return _split(jnp.where(fresh_BR.reshape(shape), taken, old))

    def keep_meta(old, x):
        return jnp.where(fresh_BR, jnp.take_along_axis(x, source_BR, axis=1), old)

    arrays = jax.tree.map(keep, cache.arrays, new)
    return seen, meta, Ring(arrays, jax.tree.map(keep_meta, cache.meta, query), cache.reach)


def last(cache: Full | Ring | None, context, name: str) -> tuple[Any, jax.Array] | None:
    """The cached arrays of the last real position of each row.

    Args:
        cache: the positions before `context.query`.
        context: a `contract.Context`.
        name: the name of the arrays.

    Returns:
        (a pytree of [B, ., 1, ...], the segments of the positions, int32 [B], 0 if there is none); None if nothing is
        cached under that name.
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
    """Shards [B, ., S, ...] over rows and heads, but not over positions, because each step writes to one."""
    return constrain(x, "batch", "kv_heads", *[None] * (x.ndim - 2))


def _places(reach: Reach, query: Meta) -> jax.Array:
    """The slot of the ring buffer for each new position, int32 [B, T]; one past the last slot if it has none.

    The first positions of an example have fixed slots; the others share the rest in turn.
    """
    first, last = reach.first, reach.last
    turn_BT = first + (query.position - first) % last if last else jnp.full_like(query.position, first)
    place_BT = jnp.where(query.position < first, query.position, turn_BT)
    return jnp.where(query.segment > 0, place_BT, first + last)  # padding has no slot


def _put(old: jax.Array, new: jax.Array, place_B: jax.Array, axis: int) -> jax.Array:
    """Writes one position of each row to its slot of an array, in place; `axis` is that of the slots within a row."""

    def in_row(old, new, place):
        return old.at[(slice(None),) * axis + (place,)].set(jnp.squeeze(new, axis), mode="drop")

    return jax.vmap(in_row)(old, new, place_B)


def _latest(place_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """For each slot of the ring buffer the latest new position that belongs there, [B, R]; whether there is one."""
    B, T = place_BT.shape
    order_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    newest_BR = jnp.full((B, size), -1, jnp.int32)
    newest_BR = newest_BR.at[jnp.arange(B)[:, None], place_BT].max(order_BT, mode="drop")
    return jnp.maximum(newest_BR, 0), newest_BR >= 0
