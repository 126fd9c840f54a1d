"""Biases added to scores by relative position: linear (ALiBi), bucketed (T5), or learned per distance."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.meta import Meta
from polygpt.attention.scores import Score, Terms, lookup
from polygpt.nn.positions import Position

# --- ALiBi ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ALiBi(Position):
    """A penalty proportional to the distance, with one slope per head. Press et al., ALiBi (2108.12409), section 3.

    It has no parameters and no length limit. The distance is absolute, so it also works in encoders.
    """

    def score(self) -> Score:
        return LinearBias()


@dataclasses.dataclass(frozen=True)
class LinearBias(Score):
    """score - slope |distance|: the score modification of `ALiBi`."""

    adds: ClassVar[bool] = True
    in_order = False

    def __call__(self, score, query, key, terms):
        return score - terms.head["slope"] * abs(query.position - key.position).astype(jnp.float32)

    def build(self, width, heads, *, rngs):
        return _Slopes(heads)


class _Slopes(nnx.Module):
    def __init__(self, heads: int):
        self.heads = heads

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        return Terms(head={"slope": jnp.asarray(slopes(self.heads), jnp.float32)})


def slopes(heads: int) -> np.ndarray:
    """The slope of each head, [H]: 2^(-8/n), 2^(-16/n), ... for n heads, a power of two.

    Otherwise, the slopes of the largest power of two below, followed by every other slope of the next power, as in the
    authors' code (github.com/ofirpress/attention_with_linear_biases) and BLOOM (2211.05100).
    """
    n = 2 ** math.floor(math.log2(heads))
    own = 2.0 ** (-8.0 / n * np.arange(1, n + 1))
    between = 2.0 ** (-4.0 / n * np.arange(1, 2 * (heads - n), 2))
    return np.concatenate([own, between])


# --- T5 ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class T5Bias(Position):
    """One learned bias per head and bucket of distances. Raffel et al., T5 (1910.10683), section 2.1.

    Half of the buckets hold one distance each, the others geometrically growing ranges up to `max_distance`; all larger
    distances share the last bucket. Each layer has its own table, whereas T5's layers share that of the first. T5 does
    not scale queries: set `scale=1.0` in the attention for that.
    """

    buckets: int = 32
    """Total number of buckets; half for each direction if bidirectional."""
    max_distance: int = 128
    """Distances from this one on share the last bucket."""
    bidirectional: bool = False
    """Whether keys after the query have buckets too, as in an encoder; otherwise they count as distance 0."""

    def validate(self):
        _require_buckets(self)

    def score(self) -> Score:
        return BucketBias(self.buckets, self.max_distance, self.bidirectional)


@dataclasses.dataclass(frozen=True)
class BucketBias(Score):
    """score + table[bucket of the distance]: the score modification of `T5Bias`."""

    adds: ClassVar[bool] = True
    in_order = False

    buckets: int = 32
    """Total number of buckets."""
    max_distance: int = 128
    """Distances from this one on share the last bucket."""
    bidirectional: bool = False
    """Whether keys after the query have their own buckets."""

    def validate(self):
        _require_buckets(self)

    def __call__(self, score, query, key, terms):
        return score + lookup(terms.head["table"], self.bucket(key.position - query.position))

    def bucket(self, relative: jax.Array) -> jax.Array:
        """The bucket of each relative position (key minus query), int32."""
        count = self.buckets // 2 if self.bidirectional else self.buckets
        distance = abs(relative) if self.bidirectional else jnp.maximum(-relative, 0)
        bucket = sum((distance >= start).astype(jnp.int32) for start in starts(count, self.max_distance)[1:])
        return bucket + count * (relative > 0).astype(jnp.int32) if self.bidirectional else bucket

    def build(self, width, heads, *, rngs):
        std = width**-0.5  # that of T5's own code
        return _Table(jax.random.normal(rngs.params(), (self.buckets, heads)) * std, std)


def _require_buckets(spec: T5Bias | BucketBias) -> None:
    """Raises SpecError, naming the user's class, unless all buckets are distinct."""
    spec.require(spec.buckets >= 4 and spec.buckets % 2 == 0, "buckets", "an even number of at least 4")
    one_each = spec.buckets // (4 if spec.bidirectional else 2)
    spec.require(spec.max_distance > one_each, "max_distance", f"above {one_each}, the distances with own buckets")


def starts(buckets: int, max_distance: int) -> list[int]:
    """The smallest distance of each bucket of one direction.

    Distances below e = buckets / 2 have one bucket each. Bucket e + k, of e + m in total, starts at
    e (max_distance / e)^(k / m). Integers are compared exactly, because float32 logarithms may round an integer start
    to either side.
    """
    exact = buckets // 2
    m, first = buckets - exact, list(range(exact))
    distance = exact
    for k in range(m):
        while distance**m * exact**k < max_distance**k * exact**m:
            distance += 1
        first.append(distance)
    return first


# --- learned for each distance ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LearnedBias(Score):
    """One learned bias per head and distance; distances beyond `distance` are clipped.

    Clipped distances: Shaw et al. (1803.02155), section 3.2, who add vectors to keys. One bias per head and distance:
    Liu et al., Swin (2103.14030), eq. 4. The table is initialised to 0.
    """

    adds: ClassVar[bool] = True
    in_order = False

    distance: int = 16
    """The largest distance, before and after the query, with its own bias."""

    def validate(self):
        # `lookup` takes one select per distance, 2 n + 1 in total, in every kernel and its gradient.
        self.require(1 <= self.distance <= 64, "distance", "from 1 to 64: use T5Bias for larger distances")

    def __call__(self, score, query, key, terms):
        relative = jnp.clip(key.position - query.position, -self.distance, self.distance)
        return score + lookup(terms.head["table"], relative + self.distance)

    def build(self, width, heads, *, rngs):
        return _Table(jnp.zeros((2 * self.distance + 1, heads)))


class _Table(nnx.Module):
    def __init__(self, table: jax.Array, std: float | None = None):
        self.table = nnx.Param(table, std=std, decays=False)

    def __call__(self, x_BTD: jax.Array, meta: Meta) -> Terms:
        return Terms(head={"table": self.table[...]})
