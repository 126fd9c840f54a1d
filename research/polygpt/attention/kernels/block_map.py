"""The block map: which blocks of queries and keys a kernel can skip, and in which it need not evaluate the mask.

The map evaluates the mask predicate itself, on ranges of metadata instead of numbers (`intervals.py`). It never builds
the matrix of pairs, and works for every mask.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.attention.kernels.intervals import Interval, Ternary
from polygpt.attention.masks import Mask, allowed
from polygpt.attention.meta import Meta

EMPTY, PARTIAL, FULL = 0, 1, 2
"""No pair of the block is visible; some may be; all are."""

_log = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames=("mask", "block_q", "block_k"))
def block_map(mask: Mask, query: Meta, key: Meta, block_q: int, block_k: int) -> jax.Array:
    """The kind of each block, int8 [B, nq, nk], nq = ceil(T / block_q), nk = ceil(S / block_k).

    An EMPTY block has no visible pair; padding keys are invisible, padding queries see whatever the mask says. In a
    FULL block all pairs are visible and there is no padding, neither segment 0 nor positions beyond T or S, so a kernel
    can ignore the mask there. Costs O(nq nk + T + S).

    The positions of a block are divided into a few classes (padding; its first, last and other examples; inside a span
    or not), and the mask is evaluated on the ranges of each pair of classes. Position ids and span numbers that restart
    with each packed example therefore do not widen the ranges. The map equals `exact_block_map` for `DECODER` and
    `ENCODER`, also combined with windows, sinks and blocks, in packed rows without spans. Otherwise it may be PARTIAL
    where the exact map is not, because it ignores which numbers within a range occur (strides across the gaps left by
    spans, modalities, three or more examples in a block) and how the parts of a mask depend on each other
    (`Strided(2) & Strided(3)` where each alone is possible; a block that is full because `Window(3) | Sinks(2)` shows
    some of its pairs by one part and the rest by the other).

    A predicate that cannot be evaluated on ranges uses the exact map, which costs O(T S), and logs a warning.

    Args:
        mask: the predicate.
        query, key: metadata, [B, T] and [B, S].
        block_q, block_k: positions per block; T and S need not be multiples.
    """
    queries, keys = _Blocks(query, block_q), _Blocks(key, block_k)
    query_range, query_class = queries.ranges(padding=True, axes=(2, 4))
    key_range, key_class = keys.ranges(padding=False, axes=(1, 3))
    try:
        seen = mask(query_range, key_range)
        if not isinstance(seen, Ternary):
            raise TypeError(f"the mask returned a {type(seen).__name__} on ranges")
    except Exception as error:  # if this is a fault of the mask, the dense predicate raises it too
        _warn_once(
            f"block map: {mask} asks every pair, because it cannot be evaluated on ranges: {type(error).__name__}: "
            f"{error}"
        )
        return exact_block_map(mask, query, key, block_q, block_k)
    both = query_class & key_class
    possibly = jnp.any(both & seen.possibly, axis=(3, 4))
    surely = jnp.all(~both | seen.surely, axis=(3, 4))
    return _named(possibly, surely, queries, keys)


@functools.partial(jax.jit, static_argnames=("mask", "block_q", "block_k"))
def exact_block_map(mask: Mask, query: Meta, key: Meta, block_q: int, block_k: int) -> jax.Array:
    """The exact map from the dense predicate, evaluated on every pair, one row of blocks at a time."""
    queries, keys = _Blocks(query, block_q), _Blocks(key, block_k)

    def row(block):
        meta, real = block
        seen = allowed(mask, meta, keys.flat)
        seen = seen.reshape(*seen.shape[:2], -1, block_k)
        pairs = real[:, :, None, None] & keys.real[:, None, :, :]
        return jnp.any(seen & pairs, axis=(1, 3)), jnp.all(seen | ~pairs, axis=(1, 3))

    blocks = jax.tree.map(lambda x: x.swapaxes(0, 1), (queries.meta, queries.real))
    possibly, surely = (x.swapaxes(0, 1) for x in jax.lax.map(row, blocks))
    return _named(possibly, surely, queries, keys)


@dataclasses.dataclass(frozen=True)
class Counts:
    """The number of blocks of each kind."""

    empty: int
    partial: int
    full: int

    @property
    def total(self) -> int:
        """All blocks."""
        return self.empty + self.partial + self.full

    @property
    def skipped(self) -> float:
        """The fraction of blocks that kernels skip."""
        return self.empty / max(self.total, 1)

    def __str__(self):
        return f"{self.empty} empty, {self.partial} partial, {self.full} full of {self.total}"


def count(blocks: jax.Array | np.ndarray) -> Counts:
    """Counts the blocks of one or several maps."""
    blocks = np.asarray(blocks)
    return Counts(*(int((blocks == kind).sum()) for kind in (EMPTY, PARTIAL, FULL)))


class _Blocks:
    """Metadata in blocks.

    Attributes:
        flat: the metadata, [B, n * size], segment 0 beyond its end.
        meta: the same, [B, n, size].
        real: bool [B, n, size], whether the position lies before the end.
        whole: bool [B, n], whether the block has no padding of either kind.
    """

    def __init__(self, meta: Meta, size: int):
        B, T = meta.segment.shape
        n = -(-T // size)
        self.flat = jax.tree.map(lambda x: jnp.pad(jnp.asarray(x, jnp.int32), ((0, 0), (0, n * size - T))), meta)
        self.meta = jax.tree.map(lambda x: x.reshape(B, n, size), self.flat)
        self.real = jnp.broadcast_to((jnp.arange(n * size) < T).reshape(1, n, size), (B, n, size))
        self.whole = jnp.all(self.real & (self.meta.segment > 0), axis=-1)

    def ranges(self, padding: bool, axes: tuple[int, int]) -> tuple[Meta, jax.Array]:
        """The intervals of metadata per class, and whether the class has members: [B, n, C], plus `axes` of size 1."""
        segment, span = self.meta.segment, self.meta.span
        used = self.real & (segment > 0)
        first = used & (segment == _low(segment, used)[..., None])
        last = used & (segment == _high(segment, used)[..., None]) & ~first
        parts = [part & side for part in (first, last, used & ~first & ~last) for side in (span == 0, span != 0)]
        if padding:
            parts.append(self.real & (segment == 0))
        member = jnp.stack(parts, axis=-1)

        def interval(x):
            ends = (bound(x[..., None], member, axis=2) for bound in (_low, _high))
            return Interval(*(jnp.expand_dims(end, axes) for end in ends))

        return jax.tree.map(interval, self.meta), jnp.expand_dims(jnp.any(member, axis=2), axes)


def _low(x, member, axis=-1):
    """The smallest member along the axis; 0 if there is none, to avoid int32 overflow in later sums."""
    found = jnp.min(jnp.where(member, x, jnp.iinfo(jnp.int32).max), axis)
    return jnp.where(jnp.any(member, axis), found, 0)


def _high(x, member, axis=-1):
    """The largest member along the axis; 0 if there is none."""
    return -_low(-x, member, axis)


def _named(possibly, surely, queries: _Blocks, keys: _Blocks) -> jax.Array:
    full = surely & queries.whole[:, :, None] & keys.whole[:, None, :]
    return jnp.where(full, FULL, jnp.where(possibly, PARTIAL, EMPTY)).astype(jnp.int8)


@functools.cache
def _warn_once(message: str) -> None:
    """Logs a warning once."""
    _log.warning(message)
