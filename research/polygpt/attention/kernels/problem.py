"""What an attention backend is asked: a rule, known when the program is compiled, and the arrays it acts on.

A backend is a file of this folder with two functions, and one more where it can take keys in parts (`ring.py`):

    refuses(rule, operands) -> str | None      why it cannot compute this, or None
    attend(rule, operands) -> (y_BHTe, lse_BHT)
    gradients(rule, operands, lse_BHT, dy_BHTe, delta_BHT) -> Operands

y is in the dtype of the values; lse, float32, is the logarithm of the sum of exponentiated scores, differentiable, for
combining the results of several calls. A query that may see nothing has y = 0, a very negative finite lse, and zero
gradients. With the sigmoid normalizer there is no sum and lse is 0.

The third gives the gradients of the operands, of their metadata None, where these keys are some of those that a query
sees: lse is that of all its keys, dy and dlse are the cotangents of what they give together, and delta, float32, is
sum_e dy y - dlse. A weight is then exp(score - lse), and the gradient of its score is weight (dy v - delta): equations
(12) to (15) in FlashAttention (2205.14135), appendix B.2. With the sigmoid normalizer neither is looked at.

Axis letters: B rows, H query heads, K key heads, T queries, S keys, d width of a query, e width of a value.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.attention.masks import Mask, Meta
from polygpt.attention.scores import Score, Terms


@dataclasses.dataclass(frozen=True)
class Rule:
    """The static half.

    Attributes:
        mask: who may see whom; padding keys (segment 0) are never seen, whatever it says.
        score: what becomes of q k^T (queries come scaled already) before the normalizer.
        normalizer: how scores become weights.
    """

    mask: Mask
    score: Score = Score()
    normalizer: Literal["softmax", "sigmoid"] = "softmax"

    def visible(self, query: Meta, key: Meta) -> jax.Array:
        """bool, of the shape that the arrays of `query` and `key` broadcast to."""
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
        terms: what the score modification reads.
    """

    query_BHTd: jax.Array
    key_BKSd: jax.Array
    value_BKSe: jax.Array
    query: Meta
    key: Meta
    terms: Terms = Terms()

    def of_queries(self, chosen_R: jax.Array) -> "Operands":
        """The same problem for the chosen queries alone, int32 indices into T."""

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

    def views(self) -> tuple[Meta, Meta, Terms]:
        """Metadata and terms with the four axes of scores, [B, 1, T, 1], [B, 1, 1, S] and so on."""
        query = jax.tree.map(lambda x: x[:, None, :, None], self.query)
        key = jax.tree.map(lambda x: x[:, None, None, :], self.key)
        return query, key, self.broadcast_terms()

    def broadcast_terms(self) -> Terms:
        """Terms as a modification reads them beside a score [B, H, T, S]."""
        return Terms(
            {name: x[..., None, :, None, None] for name, x in self.terms.head.items()},
            {name: x[..., None] for name, x in self.terms.query.items()},
            {name: x[:, :, None, :] for name, x in self.terms.key.items()},
            self.terms.pair,
        )
