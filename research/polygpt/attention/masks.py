"""The mask language: composable predicates over (query, key) metadata that define visible pairs.

A predicate is written once, such as `Causal() & SameSegment()`, independently of matrices. `allowed` lowers it to a
dense boolean array for any queries and keys, including a decode step over a cache; `kernels/block_map.py` lowers it to
the blocks that a kernel can skip.

Order in time is defined by index, distance by position id: neither padding nor packing changes distances.
"""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.attention.meta import Meta
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Reach:
    """A bound on the earlier positions of its own example that a query sees: the `first` ones and the `last` ones.

    The last ones include the query itself: `last` = 1 is the query alone, 0 excludes even that.
    """

    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Mask(Spec):
    """A predicate: True if the query may see the key. Compose with `&`, `|` and `~`.

    Write `__call__` with Python operators only (`+ - * // % abs`, comparisons, `& | ~`). It can then be evaluated on
    arrays, on tiles inside kernels, and on whole ranges of positions at once, which is how empty blocks are found.
    """

    def __call__(self, query: Meta, key: Meta) -> jax.Array:
        """bool; the arrays of `query` and `key` broadcast against each other."""
        raise NotImplementedError

    def reach(self) -> Reach | None:
        """How far back a query sees; None is unbounded. A cache need not store positions beyond it.

        It only bounds visible keys of the query's own example up to its own position, not those of other examples or
        later ones.
        """
        return None

    def labels(self) -> frozenset[str]:
        """Names of the labels that it reads, as `query.extra[name]`. They must be declared in `data.layout.labels`."""
        return frozenset()

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Both hold."""

    left: Mask
    """One."""
    right: Mask
    """The other."""

    def __call__(self, query, key):
        return self.left(query, key) & self.right(query, key)

    def reach(self):
        # The smaller reach, not the minimum per field: a key may be visible as first in one and as last in the other.
        bounds = [reach for reach in (self.left.reach(), self.right.reach()) if reach is not None]
        return min(bounds, key=lambda reach: reach.first + reach.last, default=None)

    def labels(self):
        return self.left.labels() | self.right.labels()


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """At least one holds."""

    left: Mask
    """One."""
    right: Mask
    """The other."""

    def __call__(self, query, key):
        return self.left(query, key) | self.right(query, key)

    def reach(self):
        left, right = self.left.reach(), self.right.reach()
        if left is None or right is None:
            return None
        return Reach(max(left.first, right.first), max(left.last, right.last))

    def labels(self):
        return self.left.labels() | self.right.labels()


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """The inner mask does not hold."""

    inner: Mask
    """The negated mask."""

    def __call__(self, query, key):
        return ~self.inner(query, key)

    def reach(self):
        match self.inner:  # by De Morgan's laws
            case Not(inner):
                return inner.reach()
            case And(left, right):
                return (~left | ~right).reach()
            case Or(left, right):
                return (~left & ~right).reach()
        return None

    def labels(self):
        return self.inner.labels()


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """The key does not come after the query."""

    def __call__(self, query, key):
        return key.index <= query.index


@dataclasses.dataclass(frozen=True)
class SameSegment(Mask):
    """Query and key belong to the same packed example."""

    def __call__(self, query, key):
        return query.segment == key.segment


@dataclasses.dataclass(frozen=True)
class SameSpan(Mask):
    """Query and key belong to the same bidirectional span."""

    def __call__(self, query, key):
        return (query.span == key.span) & (query.span > 0)


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """Query and key are less than `size` positions apart, in either direction. Beltagy et al., Longformer (2004.05150),
    section 3.1; combined with causality, the window of Mistral (2310.06825), section 2."""

    size: int
    """Number of positions that a query sees, up to and including itself."""

    def validate(self):
        self.require(self.size >= 1, "size", "at least 1")

    def __call__(self, query, key):
        return abs(query.position - key.position) < self.size

    def reach(self):
        return Reach(0, self.size)


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """A window with gaps: `size` keys up to and including the query, `rate` positions apart, and as many after it.
    Beltagy et al., Longformer (2004.05150), section 3.1, "dilated sliding window"."""

    rate: int
    """Distance between successive keys; 1 leaves no gaps."""
    size: int
    """Number of keys that a query sees, up to and including itself."""

    def validate(self):
        self.require(self.rate >= 1, "rate", "at least 1")
        self.require(self.size >= 1, "size", "at least 1")

    def __call__(self, query, key):
        distance = abs(query.position - key.position)
        return (distance % self.rate == 0) & (distance < self.rate * self.size)

    def reach(self):
        return Reach(0, self.rate * (self.size - 1) + 1)


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """The distance is a multiple of `stride`. Child et al., sparse transformers (1904.10509), section 4.3, A(2)."""

    stride: int
    """Distance between successive keys."""

    def validate(self):
        self.require(self.stride >= 1, "stride", "at least 1")

    def __call__(self, query, key):
        return (query.position - key.position) % self.stride == 0


@dataclasses.dataclass(frozen=True)
class Blockwise(Mask):
    """Query and key are in the same block of positions, or in blocks at most `around` apart. Qiu et al. (1911.02972),
    section 3.1; with neighbours Zaheer et al., BigBird (2007.14062), appendix D."""

    size: int
    """Positions per block."""
    around: int = 0
    """Number of blocks that a query sees on either side of its own."""

    def validate(self):
        self.require(self.size >= 1, "size", "at least 1")
        self.require(self.around >= 0, "around", "at least 0")

    def __call__(self, query, key):
        return abs(query.position // self.size - key.position // self.size) <= self.around

    def reach(self):
        return Reach(0, self.size * (self.around + 1))


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
    """The key is one of the first `count` positions. Xiao et al., StreamingLLM (2309.17453), section 3.2."""

    count: int
    """Number of first positions that every query sees."""

    def validate(self):
        self.require(self.count >= 1, "count", "at least 1")

    def __call__(self, query, key):
        return key.position < self.count

    def reach(self):
        return Reach(self.count, 0)


@dataclasses.dataclass(frozen=True)
class Global(Mask):
    """The first `count` positions see all positions and are seen by all. Beltagy et al., Longformer (2004.05150),
    section 3.1, "global attention"; Zaheer et al., BigBird (2007.14062), section 2, "internal transformer
    construction"."""

    count: int
    """Number of global positions."""

    def validate(self):
        self.require(self.count >= 1, "count", "at least 1")

    def __call__(self, query, key):
        return (query.position < self.count) | (key.position < self.count)

    def reach(self):
        return Reach(self.count, 0)  # keys up to a global query are global themselves


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Query and key are both among the first `length` positions: `Causal() | Prefix(n)` is the prefix language model of
    Raffel et al., T5 (1910.10683), section 3.2.1."""

    length: int
    """Number of positions of the prefix."""

    def validate(self):
        self.require(self.length >= 1, "length", "at least 1")

    def __call__(self, query, key):
        return (query.position < self.length) & (key.position < self.length)

    def reach(self):
        return Reach(self.length, 0)


@dataclasses.dataclass(frozen=True)
class QueryModality(Mask):
    """The query has this modality. `~(QueryModality(2) & KeyModality(1))` hides images (1) from audio (2)."""

    number: int
    """The modality: 0 is text, adapters count from 1 in the model's order."""

    def validate(self):
        self.require(self.number >= 0, "number", "at least 0")

    def __call__(self, query, key):
        return query.modality == self.number


@dataclasses.dataclass(frozen=True)
class KeyModality(Mask):
    """The key has this modality."""

    number: int
    """The modality: 0 is text, adapters count from 1 in the model's order."""

    def validate(self):
        self.require(self.number >= 0, "number", "at least 0")

    def __call__(self, query, key):
        return key.modality == self.number


@dataclasses.dataclass(frozen=True)
class SameModality(Mask):
    """Query and key have the same modality."""

    def __call__(self, query, key):
        return query.modality == key.modality


DECODER = SameSegment() & (Causal() | SameSpan())
"""The mask of decoders: the position's own example up to itself, and all of its own span."""
ENCODER = SameSegment()
"""The mask of media towers: all of the position's own item."""


def allowed(mask: Mask, query: Meta, key: Meta) -> jax.Array:
    """The predicate as a dense array, bool [B, Tq, Tk]. Padding keys are always masked."""
    rows = jax.tree.map(lambda x: x[:, :, None], query)
    columns = jax.tree.map(lambda x: x[:, None, :], key)
    visible = mask(rows, columns) & (columns.segment > 0)
    return jnp.broadcast_to(visible, (*query.segment.shape, key.segment.shape[1]))
