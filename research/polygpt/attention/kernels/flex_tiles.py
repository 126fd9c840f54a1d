"""What the kernels of `flex.py` share: the list of blocks that they visit, and the scores of one block.

A tile is the part of the score matrix where a block of queries meets a block of keys. Masks and score modifications are
functions of a pair, so they are evaluated on tiles as they are, whichever way round a tile lies: [queries, keys] for
sums over keys, [keys, queries] for sums over queries.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from polygpt.attention.kernels.block_map import EMPTY
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import Meta
from polygpt.attention.scores import Terms

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The score of a pair that the mask forbids."""
UNSEEN = LOWEST / 2
"""The least logarithm of a sum: exp(LOWEST - UNSEEN) is 0, also where a query has seen nothing at all."""
META_ROWS = 8
"""Metadata lies in the rows of one array, as many as a TPU moves at once; `Meta` has fewer, the rest is 0."""


class Visit(NamedTuple):
    """One step of a kernel: the block it works on, the block it reads, and what is to be done."""

    outer: jax.Array
    inner: jax.Array
    first: jax.Array
    last: jax.Array
    kind: jax.Array


@dataclasses.dataclass(frozen=True)
class Visits:
    """The blocks that a kernel visits, row after row, outer block after outer block; no EMPTY block costs a step.

    Attributes:
        words: int32 [B * places], one `Visit` each, packed: the scalar memory of a TPU is small.
        steps: int32 (), the visits of the row that has most; the others wait at their last block.
        places: the number of words a row.
    """

    words: jax.Array
    steps: jax.Array
    places: int

    @classmethod
    def of(cls, kind_BOI: jax.Array) -> "Visits":
        """From a block map [B, outer blocks, inner blocks].

        Each outer block is visited once at least, with nothing to do if need be: its result is written.
        """
        B, outers, inners = kind_BOI.shape
        places = outers * inners
        seen = kind_BOI != EMPTY
        nothing = ~jnp.any(seen, axis=-1, keepdims=True)
        visited = seen | (nothing & (jnp.arange(inners) == 0)[None, None, :])
        nth = jnp.cumsum(visited, axis=-1)
        first, last = nth == 1, nth == nth[..., -1:]
        words = jnp.arange(outers)[:, None] << 18 | jnp.arange(inners)[None, :] << 4
        words = words[None] | first << 3 | last << 2 | kind_BOI
        visited, words = visited.reshape(B, places), words.reshape(B, places).astype(jnp.int32)
        words = jnp.take_along_axis(words, jnp.argsort(~visited, axis=1, stable=True), axis=1)
        count = jnp.sum(visited, axis=1, dtype=jnp.int32)
        waiting = jnp.take_along_axis(words, count[:, None] - 1, axis=1) >> 4 << 4
        words = jnp.where(jnp.arange(places)[None, :] < count[:, None], words, waiting)
        return cls(words.reshape(-1), jnp.max(count), places)

    def at(self, words: jax.Array, row: jax.Array, step: jax.Array) -> Visit:
        """A step, of the words where the kernel has them."""
        word = words[row * self.places + step]
        return Visit(word >> 18, word >> 4 & 0x3FFF, word >> 3 & 1 == 1, word >> 2 & 1 == 1, word & 3)


def packed(operands: Operands) -> Operands:
    """The operands as kernels read them.

    Metadata are [B, META_ROWS, T], terms of queries and keys [B, H, 1, T], those of heads [H, ..., 1, 1]. Numbers of
    positions lie along rows: in columns each would take the room of 128 on a TPU.
    """

    def rows(meta):
        stack = jnp.stack([jnp.asarray(x, jnp.int32) for x in jax.tree.leaves(meta)], axis=1)
        return jnp.pad(stack, ((0, 0), (0, META_ROWS - stack.shape[1]), (0, 0)))

    terms = jax.tree.map(lambda x: x.astype(jnp.float32), operands.terms)
    return dataclasses.replace(
        operands,
        query=rows(operands.query),
        key=rows(operands.key),
        terms=Terms(
            {name: jnp.moveaxis(x, -1, 0)[..., None, None] for name, x in terms.head.items()},
            {name: x[:, :, None, :] for name, x in terms.query.items()},
            {name: x[:, :, None, :] for name, x in terms.key.items()},
        ),
    )


def unpacked(terms: Terms, T: int, S: int) -> Terms:
    """Terms as they were before `packed`, of the first T queries and S keys."""
    return Terms(
        {name: jnp.moveaxis(x[..., 0, 0], 0, -1) for name, x in terms.head.items()},
        {name: x[:, :, 0, :T] for name, x in terms.query.items()},
        {name: x[:, :, 0, :S] for name, x in terms.key.items()},
    )


class Place(NamedTuple):
    """Where a step of a grid is: row, query head, block of queries, block of keys."""

    row: jax.Array
    head: jax.Array
    query: jax.Array
    key: jax.Array


def specs(operands: Operands, block_q: int, block_k: int, at: Callable[..., Place]) -> Operands:
    """Which block of each packed operand a step reads; `at` takes the indices of the grid and the prefetched words."""
    group = operands.query_BHTd.shape[1] // operands.key_BKSd.shape[1]

    def spec(shape, place):
        return pl.BlockSpec(shape, lambda *indices: place(at(*indices)))

    def of_head(x):
        return spec((None, *x.shape[1:]), lambda p: (p.head, *(0 for _ in x.shape[1:])))

    query, key, value, terms = operands.query_BHTd, operands.key_BKSd, operands.value_BKSe, operands.terms
    return Operands(
        spec((None, None, block_q, query.shape[3]), lambda p: (p.row, p.head, p.query, 0)),
        spec((None, None, block_k, key.shape[3]), lambda p: (p.row, jax.lax.div(p.head, group), p.key, 0)),
        spec((None, None, block_k, value.shape[3]), lambda p: (p.row, jax.lax.div(p.head, group), p.key, 0)),
        spec((None, META_ROWS, block_q), lambda p: (p.row, 0, p.query)),
        spec((None, META_ROWS, block_k), lambda p: (p.row, 0, p.key)),
        Terms(
            jax.tree.map(of_head, terms.head),
            {name: spec((None, None, 1, block_q), lambda p: (p.row, p.head, 0, p.query)) for name in terms.query},
            {name: spec((None, None, 1, block_k), lambda p: (p.row, p.head, 0, p.key)) for name in terms.key},
        ),
    )


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of the score matrix, while a kernel works on it.

    Attributes:
        rule: what is computed.
        masked: whether the mask is asked; in a FULL block it need not be.
        product: q k^T, float32.
        query, key: metadata, int32, each array of the tile's shape.
        terms: what the modification reads, broadcasting against the tile.
    """

    rule: Rule
    masked: bool
    product: jax.Array
    query: Meta
    key: Meta
    terms: Terms

    @classmethod
    def read(cls, rule: Rule, masked: bool, refs: Operands, query_axis: int) -> "Tile":
        """The tile of the blocks at hand; the queries lie along axis 0 (the keys along 1), or the other way round."""
        key_axis = 1 - query_axis
        query, key = refs.query_BHTd[...], refs.key_BKSd[...]
        product = dot(query, key, (1, 1)) if query_axis == 0 else dot(key, query, (1, 1))
        terms = Terms(
            {name: ref[...] for name, ref in refs.terms.head.items()},
            {name: along(ref[...], query_axis) for name, ref in refs.terms.query.items()},
            {name: along(ref[...], key_axis) for name, ref in refs.terms.key.items()},
        )
        shape = product.shape
        return cls(rule, masked, product, _meta(refs.query, query_axis, shape), _meta(refs.key, key_axis, shape), terms)

    def score(self) -> jax.Array:
        """The modified score, LOWEST where it is forbidden."""
        return self._forbidden(self.rule.score(self.product, self.query, self.key, self.terms))

    def slopes(self, weight_and_slope: Callable[[jax.Array], tuple[jax.Array, jax.Array]]):
        """(weight, gradient of the product, gradients of the terms).

        Args:
            weight_and_slope: of the score; the weight of each pair and the gradient of its modified score.
        """

        def modified(product, terms):
            return self.rule.score(product, self.query, self.key, terms)

        score, pull = jax.vjp(modified, self.product, self.terms)
        weight, slope = weight_and_slope(self._forbidden(score))
        return weight, *pull(slope)

    def _forbidden(self, score):
        # Metadata have the shape of the tile: a TPU does not broadcast truth values.
        return jnp.where(self.rule.visible(self.query, self.key), score, LOWEST) if self.masked else score


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product of two matrices over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def along(row_1N: jax.Array, axis: int) -> jax.Array:
    """[1, N] as it is for axis 1, [N, 1] for axis 0."""
    return row_1N if axis == 1 else row_1N[0][:, None]


def as_row(column_N1: jax.Array) -> jax.Array:
    """[N, 1] as [1, N]: by a transposition, for which every TPU has an instruction."""
    return jnp.broadcast_to(column_N1, (column_N1.shape[0], META_ROWS)).T[:1, :]


def _meta(ref, axis, shape) -> Meta:
    count = len(dataclasses.fields(Meta))
    if axis == 1:
        return Meta(*(jnp.broadcast_to(ref[n : n + 1, :], shape) for n in range(count)))
    columns = ref[...].T
    return Meta(*(jnp.broadcast_to(columns[:, n : n + 1], shape) for n in range(count)))
