"""Score modifications: pure functions of a score and of where it stands, composed in order.

A modification is written once, as if for one pair of query and key, and every backend applies it: to the whole matrix,
to the tile of a fused kernel, to one decode step. What it needs beside the metadata, parameters or projections of the
layer's input, it names as `Terms`; they come broadcast against the score. Those that add a number for where query and
key stand are in `biases.py`.

Names of terms. A modification reads the terms that its own module makes by the names that it gave them, however it is
composed: `Then` puts "first." or "second." before them while they are under way. Terms that the attention module itself
makes (`MultiHeadModule.own_terms`, `pair_terms`) are there for every modification, except where its own have that name.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.masks import Meta
from polygpt.errors import SpecError
from polygpt.nn.linear import Linear
from polygpt.spec import Spec

FIRST, SECOND = "first", "second"
"""The names of the two parts of `Then`: of its fields, its modules, and, with a dot, what begins their terms."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """Arrays that a modification reads, by name; float32 and differentiable.

    Attributes:
        head: [..., H], a number or a table a head.
        query: [B, H, T], a number a head and query.
        key: [B, H, S], a number a head and key; the cache remembers them.
        pair: [B, H, T, S], a number a head and pair; memory grows with T S, and `flex` refuses them.
        sum: [B, H, T], summed along each packed example up to each position, itself included, padding left out, through
            the cache. A modification finds the sums among the terms of `query` and of `key`, by the same name.
    """

    head: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    query: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    key: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    pair: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    sum: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def merged(self, own: "Terms") -> "Terms":
        """These with those of the attention module, under names that are not taken; SpecError for a name with a dot."""
        for name in (name for kind in vars(own).values() for name in kind if "." in name):
            raise SpecError(
                f"term {name!r}: a name has no dot, since {FIRST}. and {SECOND}. begin those of composed scores"
            )
        return Terms(*({**getattr(own, kind), **arrays} for kind, arrays in vars(self).items()))


@dataclasses.dataclass(frozen=True)
class Score(Spec):
    """A modification; this base class leaves the score alone. A new one derives from it and overrides `__call__`."""

    adds: ClassVar[bool] = True
    """Said beside a `__call__` that adds what does not depend on the score; of another `__call__` it says nothing."""

    def __call__(self, score: jax.Array, query: Meta, key: Meta, terms: Terms) -> jax.Array:
        """The new score, float32.

        All arrays have the rank of `score` and broadcast against it; a term [..., H] has its leading axes before them.
        It is called for pairs that the mask forbids too and must be finite there, and its gradient as well.
        """
        return score

    def build(self, width: int, heads: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """A module `(x_BTD, meta) -> Terms` for `heads` heads at the model width `width`; None where there are none."""
        return None

    def additive(self) -> bool:
        """Whether it adds what does not depend on the score: a backend may then be given the sum as a bias.

        It goes by `adds` of the very class whose `__call__` it is: who overrides that inherits no promise about it.
        """
        author = next(cls for cls in type(self).__mro__ if "__call__" in vars(cls))
        return vars(author).get("adds", False)

    def then(self, other: "Score") -> "Score":
        """This one first, `other` on its result."""
        if type(self) is Score or type(other) is Score:
            return self if type(other) is Score else other
        return Then(self, other)


@dataclasses.dataclass(frozen=True)
class Then(Score):
    """Two modifications, one after the other."""

    adds: ClassVar[bool] = True

    first: Score
    """What acts on the score."""
    second: Score
    """What acts on the result."""

    def __call__(self, score, query, key, terms):
        score = self.first(score, query, key, _of(FIRST, terms))
        return self.second(score, query, key, _of(SECOND, terms))

    def build(self, width, heads, *, rngs):
        return _Then(self, width, heads, rngs)

    def additive(self):
        return super().additive() and self.first.additive() and self.second.additive()


class _Then(nnx.Module):
    def __init__(self, spec: Then, width: int, heads: int, rngs: nnx.Rngs):
        self.first = spec.first.build(width, heads, rngs=rngs)
        self.second = spec.second.build(width, heads, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        parts = {
            name: Terms() if module is None else module(x_BTD, meta)
            for name, module in ((FIRST, self.first), (SECOND, self.second))
        }
        kinds = (
            {f"{name}.{key}": array for name, terms in parts.items() for key, array in vars(terms)[kind].items()}
            for kind in vars(Terms())
        )
        return Terms(*kinds)


def _of(name: str, terms: Terms) -> Terms:
    """The terms of one of two modifications, and those of the attention module."""

    def own(arrays):
        shared = {key: a for key, a in arrays.items() if "." not in key}
        return shared | {key.removeprefix(f"{name}."): a for key, a in arrays.items() if key.startswith(f"{name}.")}

    return Terms(*map(own, vars(terms).values()))


def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index] of a head term [n, ...]: `index` is int32 of the score's shape, in [0, n).

    A sum of selections, not a gather: the one form that every kernel compiles and differentiates. Use it for small n.
    """
    return sum(jnp.where(index == i, table[i], 0.0) for i in range(table.shape[0]))


def _head_numbers(linear: nnx.Module, x_BTD: jax.Array) -> jax.Array:
    """What a projection [D, H] makes of the layer's input, float32 [B, H, T], as terms of queries and keys are kept."""
    return linear(x_BTD).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Scale(Score):
    """The score times a factor, beside the usual 1 / sqrt(d)."""

    factor: float = 1.0
    """The factor."""

    def __call__(self, score, query, key, terms):
        return score * self.factor


@dataclasses.dataclass(frozen=True)
class SoftCap(Score):
    """cap * tanh(score / cap): scores stay within the cap. Gemma 2 (2408.00118), section 2, "logit soft-capping"."""

    cap: float = 50.0
    """The bound that scores approach."""

    def validate(self):
        self.require(self.cap > 0, "cap", "above 0")

    def __call__(self, score, query, key, terms):
        return self.cap * jnp.tanh(score / self.cap)


@dataclasses.dataclass(frozen=True)
class LengthTemperature(Score):
    """The score times log(n) / log(length), but at least 1, for the query that is the n-th of its example.

    Scores times log n, so that the weights of long texts stay as sharp as those of short ones, are of Chiang and Cholak
    (2202.12172) and Su (2021, kexue.fm/archives/8823). With this ratio, which leaves texts of the trained length alone,
    it is the LogN-Scaling of Qwen (2309.16609).
    """

    length: int = 1024
    """The length that the model is trained at."""

    def validate(self):
        self.require(self.length >= 2, "length", "at least 2")

    def __call__(self, score, query, key, terms):
        longer = jnp.maximum(query.position + 1, self.length).astype(jnp.float32) / self.length
        return score * (1 + jnp.log(longer) / math.log(self.length))  # log n = log(n / length) + log(length)


@dataclasses.dataclass(frozen=True)
class KeyGate(Score):
    """The score plus log sigmoid(w x + b) of the key's input x: a key's part of the softmax is multiplied by its gate.

    A key can so take itself out, for all queries alike. It is the log forget gate of `ForgetGate` without the sum over
    what lies between key and query.
    """

    adds: ClassVar[bool] = True

    def __call__(self, score, query, key, terms):
        return score + terms.key["gate"]

    def build(self, width, heads, *, rngs):
        return _KeyGate(width, heads, rngs)


class _KeyGate(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.gate = Linear(width, heads, rngs=rngs, bias=True, dtype="float32")

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        return Terms(key={"gate": jax.nn.log_sigmoid(_head_numbers(self.gate, x_BTD))})


@dataclasses.dataclass(frozen=True)
class ForgetGate(Score):
    """The score plus log f_{j+1} + ... + log f_i, f = sigmoid(w x + b): every position on the way fades what is before.

    Lin et al., Forgetting Transformer (2503.02130), section 3, eq. 6 to 9: for query i and key j, the difference of two
    running sums. The paper is causal; for a later key of a bidirectional span the sum runs from i to j.
    """

    adds: ClassVar[bool] = True

    def __call__(self, score, query, key, terms):
        return score - abs(terms.query["forget"] - terms.key["forget"])

    def build(self, width, heads, *, rngs):
        return _ForgetGate(width, heads, rngs)


class _ForgetGate(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.gate = Linear(width, heads, rngs=rngs, bias=True, dtype="float32")

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        return Terms(sum={"forget": jax.nn.log_sigmoid(_head_numbers(self.gate, x_BTD))})


@dataclasses.dataclass(frozen=True)
class QueryTemperature(Score):
    """The score times 2 sigmoid(w x + b) of the query's input x: a query decides how sharply it looks.

    A temperature that the query's own input gives, as in Selective Self-Attention (Zhang et al., 2411.12892), which
    makes it of a small network and of the position. Here one map a head; a factor of 1 where it gives 0.
    """

    def __call__(self, score, query, key, terms):
        return score * terms.query["factor"]

    def build(self, width, heads, *, rngs):
        return _QueryTemperature(width, heads, rngs)


class _QueryTemperature(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.factor = Linear(width, heads, rngs=rngs, bias=True, dtype="float32")

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        return Terms(query={"factor": 2 * jax.nn.sigmoid(_head_numbers(self.factor, x_BTD))})
