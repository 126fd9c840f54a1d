"""Shared parts of the `flex.py` kernels: the list of blocks to visit, and the scores of one block.

A tile is the part of the score matrix for a block of queries and a block of keys. Masks and score modifications are
functions of a pair, so they can be evaluated on tiles in either orientation: [queries, keys] for sums over keys,
[keys, queries] for sums over queries.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from polygpt.attention.kernels.block_map import EMPTY
from polygpt.attention.kernels.problem import LOWEST, Operands, Rule
from polygpt.attention.meta import Meta
from polygpt.attention.scores import Terms

UNSEEN = LOWEST / 2
"""The initial largest score: exp(LOWEST - UNSEEN) is 0, even for a query without visible keys."""
META_ROWS = 8
"""Metadata is stored in the rows of one array, as many as a TPU moves at once; unused rows are 0."""
OWN_ROWS = len(dataclasses.fields(Meta)) - 1
"""Rows of what every position has; labels take the others."""


class Visit(NamedTuple):
    """One step of a kernel: the block to accumulate into, the block to read, and what to do."""

    outer: jax.Array
    inner: jax.Array
    first: jax.Array
    last: jax.Array
    kind: jax.Array


@dataclasses.dataclass(frozen=True)
class Visits:
    """The blocks that a kernel visits, by row and outer block; EMPTY blocks take no step.

    Attributes:
        words: int32 [B * places], one packed `Visit` per word, because TPU scalar memory is small.
        steps: int32 (), the maximum number of visits of any row; the other rows idle at their last block.
        places: number of words per row.
    """

    words: jax.Array
    steps: jax.Array
    places: int

    @classmethod
    def of(cls, kind_BOI: jax.Array) -> "Visits":
        """From a block map [B, outer blocks, inner blocks].

        Each outer block is visited at least once, because its result must be written even if it has nothing to do.
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
        """A step, decoded from the prefetched words."""
        word = words[row * self.places + step]
        return Visit(word >> 18, word >> 4 & 0x3FFF, word >> 3 & 1 == 1, word >> 2 & 1 == 1, word & 3)


def packed(operands: Operands) -> Operands:
    """The operands in the layout of the kernels.

    Metadata is [B, META_ROWS, T], query and key terms are [B, H, 1, T], head terms [H, ..., 1, 1]. Values per position
    lie along rows: as a column, each would take the space of 128 on a TPU.
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
    """The inverse of `packed` for terms, cut to the first T queries and S keys."""
    return Terms(
        {name: jnp.moveaxis(x[..., 0, 0], 0, -1) for name, x in terms.head.items()},
        {name: x[:, :, 0, :T] for name, x in terms.query.items()},
        {name: x[:, :, 0, :S] for name, x in terms.key.items()},
    )


class Place(NamedTuple):
    """The coordinates of a grid step: row, query head, block of queries, block of keys."""

    row: jax.Array
    head: jax.Array
    query: jax.Array
    key: jax.Array


def specs(operands: Operands, block_q: int, block_k: int, at: Callable[..., Place]) -> Operands:
    """The block specs of the packed operands; `at` maps grid indices and prefetched words to a `Place`."""
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
    """One tile of the score matrix inside a kernel.

    Attributes:
        rule: the rule to compute.
        masked: whether to apply the mask; unnecessary in a FULL block.
        product: q k^T, float32.
        query, key: metadata, int32, arrays of the tile's shape.
        terms: inputs of the score modification, broadcasting against the tile.
    """

    rule: Rule
    masked: bool
    product: jax.Array
    query: Meta
    key: Meta
    terms: Terms

    @classmethod
    def read(cls, rule: Rule, masked: bool, refs: Operands, query_axis: int) -> "Tile":
        """The tile of the current blocks; queries along `query_axis`, keys along the other axis."""
        key_axis = 1 - query_axis
        query, key = refs.query_BHTd[...], refs.key_BKSd[...]
        product = dot(query, key, (1, 1)) if query_axis == 0 else dot(key, query, (1, 1))
        terms = Terms(
            {name: ref[...] for name, ref in refs.terms.head.items()},
            {name: along(ref[...], query_axis) for name, ref in refs.terms.query.items()},
            {name: along(ref[...], key_axis) for name, ref in refs.terms.key.items()},
        )
        shape = product.shape
        labels = rule.mask.labels()
        query, key = _meta(refs.query, query_axis, shape, labels), _meta(refs.key, key_axis, shape, labels)
        return cls(rule, masked, product, query, key, terms)

    def score(self) -> jax.Array:
        """The modified score, LOWEST for masked pairs."""
        return self._mask(self.rule.score(self.product, self.query, self.key, self.terms))

    def slopes(self, weight_and_slope: Callable[[jax.Array], tuple[jax.Array, jax.Array]]):
        """(weight, gradient of the product, gradients of the terms).

        Args:
            weight_and_slope: maps scores to the weight of each pair and the gradient of its modified score.
        """

        def modified(product, terms):
            return self.rule.score(product, self.query, self.key, terms)

        score, pull = jax.vjp(modified, self.product, self.terms)
        weight, slope = weight_and_slope(self._mask(score))
        return weight, *pull(slope)

    def _mask(self, score):
        # Metadata has the shape of the tile, because TPUs do not broadcast booleans.
        return jnp.where(self.rule.visible(self.query, self.key), score, LOWEST) if self.masked else score


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product of two matrices over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def along(row_1N: jax.Array, axis: int) -> jax.Array:
    """[1, N] for axis 1, [N, 1] for axis 0."""
    return row_1N if axis == 1 else row_1N[0][:, None]


def as_row(column_N1: jax.Array) -> jax.Array:
    """[N, 1] -> [1, N] by a transposition, which every TPU supports in hardware."""
    return jnp.broadcast_to(column_N1, (column_N1.shape[0], META_ROWS)).T[:1, :]


def _meta(ref, axis, shape, labels) -> Meta:
    structure = jax.tree.structure(Meta(*[0] * OWN_ROWS, dict.fromkeys(labels, 0)))
    columns = None if axis == 1 else ref[...].T

    def part(n):
        return jnp.broadcast_to(ref[n : n + 1, :] if axis == 1 else columns[:, n : n + 1], shape)

    return structure.unflatten(map(part, range(structure.num_leaves)))
