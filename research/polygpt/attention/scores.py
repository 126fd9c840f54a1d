"""Score modifications: composable pure functions of a score and its query and key metadata.

A modification is written once, as if for a single pair of query and key, and every backend applies it: to the whole
matrix, to a tile of a fused kernel, or to one decode step. Inputs other than metadata, such as parameters or
projections of the layer's input, are passed as `Terms`, which broadcast against the score. Biases by relative position
are in `biases.py`.

Names of terms. A modification reads the terms of its own module by the names it gave them, however it is composed:
internally, `Then` prefixes them with "first." or "second.". Terms of the attention module itself
(`MultiHeadModule.own_terms`, `pair_terms`) are available to every modification that has no term of the same name.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.meta import Meta
from polygpt.attention.zigzag import needs_order
from polygpt.errors import SpecError
from polygpt.nn.linear import Linear
from polygpt.spec import Spec

FIRST, SECOND = "first", "second"
"""The names of the two parts of `Then`: of its fields, its modules and, with a dot, the prefixes of their terms."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """Inputs of a score modification by name; float32 and differentiable.

    Attributes:
        head: [..., H], one value or table per head.
        query: [B, H, T], one value per head and query.
        key: [B, H, S], one value per head and key; cached.
        pair: [B, H, T, S], one value per head and pair; memory grows with T S, and `flex` does not support them.
        sum: [B, H, T], accumulated along each packed example up to and including each position, skipping padding, also
            across cached calls. A modification reads the sums as `query` and `key` terms of the same name.
    """

    head: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    query: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    key: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    pair: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    sum: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def merged(self, own: "Terms") -> "Terms":
        """These terms, plus the attention module's whose names are free. Raises SpecError for names with a dot."""
        for name in (name for kind in vars(own).values() for name in kind if "." in name):
            raise SpecError(
                f"term {name!r}: a name has no dot, because {FIRST}. and {SECOND}. are prefixes of composed scores"
            )
        return Terms(*({**getattr(own, kind), **arrays} for kind, arrays in vars(self).items()))


@dataclasses.dataclass(frozen=True)
class Score(Spec):
    """A score modification; this base class does nothing. A new one derives from it and overrides `__call__`."""

    adds: ClassVar[bool] = True
    """Declares that the `__call__` of the same class adds a bias that does not depend on the score."""

    in_order: ClassVar[bool] = False
    """Whether the module of `build` reads neighbours in its input, or has running sums (`Terms.sum`), see
    `Attention.in_order`. A class that defines `build` declares it again."""

    def __call__(self, score: jax.Array, query: Meta, key: Meta, terms: Terms) -> jax.Array:
        """The new score, float32.

        All arrays have the rank of `score` and broadcast against it; the leading axes of a term [..., H] come first.
        It is also called for masked pairs, where the result and its gradient must be finite.
        """
        return score

    def build(self, width: int, heads: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """A module `(x_BTD, meta) -> Terms` for `heads` heads at model width `width`; None if there are no terms."""
        return None

    def additive(self) -> bool:
        """Whether it adds a bias that does not depend on the score, which can then be passed to a backend as a bias.

        Uses `adds` of the class that defines `__call__`: a subclass that overrides `__call__` must declare it again.
        """
        author = next(cls for cls in type(self).__mro__ if "__call__" in vars(cls))
        return vars(author).get("adds", False)

    def then(self, other: "Score") -> "Score":
        """Applies this modification, then `other` to its result."""
        if type(self) is Score or type(other) is Score:
            return self if type(other) is Score else other
        return Then(self, other)


@dataclasses.dataclass(frozen=True)
class Then(Score):
    """Two modifications, one after the other."""

    adds: ClassVar[bool] = True

    first: Score
    """Applied to the score."""
    second: Score
    """Applied to the result."""

    def __call__(self, score, query, key, terms):
        score = self.first(score, query, key, _of(FIRST, terms))
        return self.second(score, query, key, _of(SECOND, terms))

    def build(self, width, heads, *, rngs):
        return _Then(self, width, heads, rngs)

    @property
    def in_order(self) -> bool:
        """Whether one of the two needs it."""
        return needs_order(self.first) or needs_order(self.second)

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
    """The terms of one of the two modifications, plus those of the attention module."""

    def own(arrays):
        shared = {key: a for key, a in arrays.items() if "." not in key}
        return shared | {key.removeprefix(f"{name}."): a for key, a in arrays.items() if key.startswith(f"{name}.")}

    return Terms(*map(own, vars(terms).values()))


def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index] of a head term [n, ...]: `index` is int32 of the score's shape, in [0, n).

    A sum of selects instead of a gather: the only form that every kernel compiles and differentiates. Use it for small
    n.
    """
    return sum(jnp.where(index == i, table[i], 0.0) for i in range(table.shape[0]))


def _head_numbers(linear: nnx.Module, x_BTD: jax.Array) -> jax.Array:
    """A projection [D, H] of the layer's input, float32 [B, H, T], in the layout of query and key terms."""
    return linear(x_BTD).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Scale(Score):
    """The score times a factor, in addition to the usual 1 / sqrt(d)."""

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
    """The score times max(1, log(n) / log(length)) for the n-th query of an example.

    Chiang and Cholak (2202.12172) and Su (2021, kexue.fm/archives/8823) multiply scores by log n to keep the weights of
    long texts as sharp as those of short ones. This ratio, which leaves texts up to the training length unchanged, is
    Qwen's LogN-Scaling (2309.16609).
    """

    length: int = 1024
    """The training length."""

    def validate(self):
        self.require(self.length >= 2, "length", "at least 2")

    def __call__(self, score, query, key, terms):
        longer = jnp.maximum(query.position + 1, self.length).astype(jnp.float32) / self.length
        return score * (1 + jnp.log(longer) / math.log(self.length))  # log n = log(n / length) + log(length)


@dataclasses.dataclass(frozen=True)
class KeyGate(Score):
    """The score plus log sigmoid(w x + b) of the key's input x: multiplies a key's share of the softmax by its gate.

    A key can thus remove itself for all queries. It is the log forget gate of `ForgetGate` without the sum over the
    positions between key and query.
    """

    adds: ClassVar[bool] = True
    in_order = False

    def __call__(self, score, query, key, terms):
        return score + terms.key["gate"]

    def build(self, width, heads, *, rngs):
        return _LogGate("key", "gate", width, heads, rngs)


class _LogGate(nnx.Module):
    """Log sigmoid of a linear map per head, [B, H, T], as the term `name` of one kind of `Terms`."""

    def __init__(self, kind: Literal["key", "sum"], name: str, width: int, heads: int, rngs: nnx.Rngs):
        self.kind, self.name = kind, name
        self.gate = Linear(width, heads, rngs=rngs, bias=True, dtype="float32")

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        return Terms(**{self.kind: {self.name: jax.nn.log_sigmoid(_head_numbers(self.gate, x_BTD))}})


@dataclasses.dataclass(frozen=True)
class ForgetGate(Score):
    """The score plus log f_{j+1} + ... + log f_i, f = sigmoid(w x + b): every position decays the ones before it.

    Lin et al., Forgetting Transformer (2503.02130), section 3, eq. 6 to 9: for query i and key j, the difference of two
    running sums. The paper is causal; for a later key of a bidirectional span, the sum runs from i to j.
    """

    adds: ClassVar[bool] = True
    in_order = True  # a running sum

    def __call__(self, score, query, key, terms):
        return score - abs(terms.query["forget"] - terms.key["forget"])

    def build(self, width, heads, *, rngs):
        return _LogGate("sum", "forget", width, heads, rngs)


@dataclasses.dataclass(frozen=True)
class QueryTemperature(Score):
    """The score times 2 sigmoid(w x + b) of the query's input x: each query sets its own temperature.

    Selective Self-Attention (Zhang et al., 2411.12892) computes the temperature with a small network and from the
    position. Here it is one linear map per head; an output of 0 gives a factor of 1.
    """

    in_order = False

    def __call__(self, score, query, key, terms):
        return score * terms.query["factor"]

    def build(self, width, heads, *, rngs):
        return _QueryTemperature(width, heads, rngs)


class _QueryTemperature(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.factor = Linear(width, heads, rngs=rngs, bias=True, dtype="float32")

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        return Terms(query={"factor": 2 * jax.nn.sigmoid(_head_numbers(self.factor, x_BTD))})
