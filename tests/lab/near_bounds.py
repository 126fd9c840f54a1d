"""Attention that is off by a given amount at one place: what lies just within a bound and just beyond it."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp

from polygpt.api import MultiHead, Score
from polygpt.attention.cache import Ring
from polygpt.attention.masks import Window
from polygpt.attention.multi_head import MultiHeadModule


@dataclasses.dataclass(frozen=True)
class Off(MultiHead):
    """Results are multiplied by 1 + `by`: in one of the places below, else while the function called so is traced."""

    where: str = "step"
    """The place."""
    by: float = 0.0
    """By how much."""

    def mask(self, mask):
        return mask & Window(8) if self.where == "ring" else mask

    def build(self, dims, rngs):
        return OffModule(self, dims, rngs)


class OffModule(MultiHeadModule):
    def __call__(self, x_BTD, context, cache=None):
        y_BTD, new = super().__call__(x_BTD, context, cache)
        padding_BT1 = (context.query.segment == 0)[..., None]
        places = {
            "step": x_BTD.shape[1] == 1,
            "ring": isinstance(cache, Ring),
            "pause": (cache is not None) & padding_BT1.any(),
            "backend": self.spec.backend == "chunked",
            "behind others": (context.query.index > context.query.position)[..., None] & (cache is None),
            "beside garbage": (jnp.where(padding_BT1, abs(x_BTD), 0) > 5).any(),
            "alone": x_BTD.shape[0] == 1,
            "larger": x_BTD.shape[1] == 32,
            "far": (context.query.position > 100)[..., None] & (x_BTD.shape[1] == 1),
            "bfloat16": x_BTD.dtype == jnp.bfloat16,
            "bfloat16, far": (x_BTD.dtype == jnp.bfloat16) & (context.query.position > 400)[..., None],
        }
        if self.spec.where == "gradient":
            return steeper(y_BTD, self.spec.by), new
        if self.spec.where == "ahead":
            return y_BTD + self.spec.by * jnp.roll(x_BTD, -1, axis=1), new
        there = places.get(self.spec.where, any(frame.function == self.spec.where for frame in inspect.stack()))
        return y_BTD * jnp.where(there, 1 + self.spec.by, 1).astype(y_BTD.dtype), new

    def weigh(self, rule, operands):
        return super().weigh(rule, operands) * (1 + self.spec.by * (self.spec.where == "weights"))


@jax.custom_jvp
def steeper(x, by):
    """x, whose derivative is said to be 1 + by."""
    return x


@steeper.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] * jnp.asarray(1 + primals[1], tangents[0].dtype)


@dataclasses.dataclass(frozen=True)
class Unseen(Score):
    """One in `every` pairs gets no weight."""

    every: int = 100
    """How many pairs."""

    def __call__(self, score, query, key, terms):
        number = 24 * query.index + 7 * key.index
        return jnp.where((number % self.every == 0) & (query.index != key.index), -1e9, score)


@dataclasses.dataclass(frozen=True)
class SomeUnseen(MultiHead):
    """Some pairs that the mask shows have no weight."""

    every: int = 100
    """One of so many."""

    def score(self, score):
        return super().score(score).then(Unseen(self.every))
