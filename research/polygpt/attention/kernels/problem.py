"""The input of attention backends: a rule, static at compile time, and the arrays it applies to.

A backend is a file of this folder with two functions, and a third if it can process keys in parts (`ring.py`):

    refuses(rule, operands) -> str | None      why it cannot compute this, or None
    attend(rule, operands) -> (y_BHTe, lse_BHT)
    gradients(rule, operands, lse_BHT, dy_BHTe, delta_BHT) -> Operands

y has the dtype of the values. lse, float32, is the log of the sum of exponentiated scores; it is differentiable and
serves to combine the results of several calls. A query without visible keys has y = 0, a very negative finite lse, and
zero gradients. With the sigmoid normalizer there is no sum and lse is 0.

`gradients` returns the gradients of the operands (None for metadata) if these keys are only a part of a query's keys:
lse is that of all its keys, dy and dlse are the cotangents of the combined result, and delta, float32, is
sum_e dy y - dlse. A weight is then exp(score - lse), and the gradient of its score is weight (dy v - delta): equations
(12) to (15) in FlashAttention (2205.14135), appendix B.2. The sigmoid normalizer uses neither lse nor delta.

Axis letters: B rows, H query heads, K key heads, T queries, S keys, d width of a query, e width of a value.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.attention.masks import Mask
from polygpt.attention.meta import Meta
from polygpt.attention.scores import Score, Terms

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The score of a masked pair, instead of -inf: softmax of a row without visible keys, and its gradient, stay finite."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """The static half.

    Attributes:
        mask: which keys each query may see; padding keys (segment 0) are always masked.
        score: the modification of q k^T before the normalizer; queries are already scaled.
        normalizer: how to turn scores into weights.
        across: whether queries and keys are positions of different sequences, as in cross-attention.
        run: the number of successive positions of a row after which another part of it may follow in the arrays, so
            that blocks should not be longer; None if arrays are in the row's order.
        lse: whether lse is used, so that it must come with the values.
        staged: whether pipeline stages run as one, where choosing at run time would compute all that is to choose from.
    """

    mask: Mask
    score: Score = Score()
    normalizer: Literal["softmax", "sigmoid"] = "softmax"
    across: bool = False
    run: int | None = None
    lse: bool = False
    staged: bool = False

    def block(self, size: int) -> int:
        """A block size of at most `size` positions, none of which straddles two runs if the run is a multiple."""
        return size if self.run is None else min(size, self.run)

    def visible(self, query: Meta, key: Meta) -> jax.Array:
        """bool, of the broadcast shape of `query` and `key`."""
        shape = jnp.broadcast_shapes(query.index.shape, key.index.shape)
        return jnp.broadcast_to(self.mask(query, key) & (key.segment > 0), shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays. Each of the K key heads serves H / K successive query heads (Ainslie et al., GQA, 2305.13245).

    Attributes:
        query_BHTd: scaled queries.
        key_BKSd: keys.
        value_BKSe: values.
        query: metadata of the queries, [B, T].
        key: metadata of the keys, [B, S].
        terms: inputs of the score modification.
    """

    query_BHTd: jax.Array
    key_BKSd: jax.Array
    value_BKSe: jax.Array
    query: Meta
    key: Meta
    terms: Terms = Terms()

    def with_labels(self, labels: Iterable[str]) -> "Operands":
        """The same problem with the metadata that a mask reads. Raises SpecError if a label is not there."""
        return dataclasses.replace(self, query=self.query.only(labels), key=self.key.only(labels))

    def of_queries(self, chosen_R: jax.Array) -> "Operands":
        """The same problem for the chosen queries only, int32 indices into T."""

        def chosen(x, axis):
            return jnp.take(x, chosen_R, axis=axis)

        return dataclasses.replace(
            self,
            query_BHTd=chosen(self.query_BHTd, 2),
            query=jax.tree.map(lambda x: chosen(x, 1), self.query),
            terms=dataclasses.replace(
                self.terms,
                query={name: chosen(x, 2) for name, x in self.terms.query.items()},
                pair={name: chosen(x, 2) for name, x in self.terms.pair.items()},
            ),
        )

    def padded(self, queries: int, keys: int) -> "Operands":
        """Appends positions of segment 0: keys that are never visible, and queries whose results are discarded."""
        terms = self.terms
        return Operands(
            padded(self.query_BHTd, 2, queries),
            padded(self.key_BKSd, 2, keys),
            padded(self.value_BKSe, 2, keys),
            jax.tree.map(lambda x: padded(x, 1, queries), self.query),
            jax.tree.map(lambda x: padded(x, 1, keys), self.key),
            dataclasses.replace(
                terms,
                # Repeat the last term: scores need not be finite for values that do not occur, such as 0.
                query={name: padded(x, 2, queries, None) for name, x in terms.query.items()},
                key={name: padded(x, 2, keys, None) for name, x in terms.key.items()},
                pair={name: padded(padded(x, 2, queries, None), 3, keys, None) for name, x in terms.pair.items()},
            ),
        )

    def views(self) -> tuple[Meta, Meta, Terms]:
        """Metadata and terms that broadcast against scores, [B, 1, T, 1], [B, 1, 1, S] and so on."""
        query = jax.tree.map(lambda x: x[:, None, :, None], self.query)
        key = jax.tree.map(lambda x: x[:, None, None, :], self.key)
        return query, key, self.broadcast_terms()

    def broadcast_terms(self) -> Terms:
        """Terms that broadcast against scores [B, H, T, S]."""
        return Terms(
            {name: x[..., None, :, None, None] for name, x in self.terms.head.items()},
            {name: x[..., None] for name, x in self.terms.query.items()},
            {name: x[:, :, None, :] for name, x in self.terms.key.items()},
            self.terms.pair,
        )


def padded(x: jax.Array, axis: int, count: int, fill: float | None = 0.0) -> jax.Array:
    """Appends `count` entries to an axis: `fill`, or the last entry repeated if `fill` is None."""
    widths = [(0, count if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, mode="edge") if fill is None else jnp.pad(x, widths, constant_values=fill)
