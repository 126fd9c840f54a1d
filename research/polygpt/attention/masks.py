"""The mask language: who may see whom, as a composable predicate over (query, key) metadata.

A predicate is written once, as `Causal() & SameSegment()`, and knows nothing of matrices. `allowed` lowers it to a
dense boolean array for any queries and keys, a decode step over a cache included; `kernels/block_map.py` lowers it to
the blocks that a kernel may skip.

Time is told by index, distance by position id: neither padding nor what is packed beside an example changes distances.
"""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.spec import Spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Meta:
    """What a mask knows of positions; each array is [B, T].

    Attributes:
        index: the place in the row (or in the cache), by which order in time is decided.
        position: position id, restarted for each packed example.
        segment: packed example, from 1; 0 is padding.
        span: bidirectional span, 0 none.
        modality: as in `polygpt.sequence`.
    """

    index: jax.Array
    position: jax.Array
    segment: jax.Array
    span: jax.Array
    modality: jax.Array


@dataclasses.dataclass(frozen=True)
class Reach:
    """The positions of its own example up to itself that a query sees at most: the `first` ones, and the `last` ones.

    With `last` = 1 that is the query itself beside the first ones, with 0 not even that.
    """

    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Mask(Spec):
    """A predicate: True where the query may see the key. Compose with `&`, `|` and `~`.

    Write `__call__` with the operators of Python alone (`+ - * // % abs`, comparisons, `& | ~`): it is then evaluated
    on arrays, on tiles inside kernels and on whole ranges of positions at once, by which empty blocks are found.
    """

    def __call__(self, query: Meta, key: Meta) -> jax.Array:
        """bool; the arrays of `query` and `key` broadcast against each other."""
        raise NotImplementedError

    def reach(self) -> Reach | None:
        """How far back a query sees; None is without bound. A cache need not remember what lies beyond it.

        It bounds what is visible among the keys of the query's own example at its position and before; of other
        examples and of later keys it says nothing.
        """
        return None

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
        # The smaller one, not the smaller of each half: what is first to one and last to the other is visible.
        bounds = [reach for reach in (self.left.reach(), self.right.reach()) if reach is not None]
        return min(bounds, key=lambda reach: reach.first + reach.last, default=None)


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


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """The inner one does not hold."""

    inner: Mask
    """What must not hold."""

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
    """Query and key are less than `size` positions apart, to either side. Beltagy et al., Longformer (2004.05150),
    section 3.1; beside causality the window of Mistral (2310.06825), section 2."""

    size: int
    """How many positions up to and with itself a query sees."""

    def validate(self):
        self.require(self.size >= 1, "size", "at least 1")

    def __call__(self, query, key):
        return abs(query.position - key.position) < self.size

    def reach(self):
        return Reach(0, self.size)


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """A window with gaps: `size` keys up to and with the query, `rate` positions apart, and as many to the other side.
    Beltagy et al., Longformer (2004.05150), section 3.1, "dilated sliding window"."""

    rate: int
    """Positions from one key to the next; 1 leaves no gaps."""
    size: int
    """How many keys up to and with itself a query sees."""

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
    """Positions from one key to the next."""

    def validate(self):
        self.require(self.stride >= 1, "stride", "at least 1")

    def __call__(self, query, key):
        return (query.position - key.position) % self.stride == 0


@dataclasses.dataclass(frozen=True)
class Blockwise(Mask):
    """Query and key lie in the same block of positions, or in blocks not more than `around` apart. Qiu et al.
    (1911.02972), section 3.1; with neighbours Zaheer et al., BigBird (2007.14062), appendix D."""

    size: int
    """Positions of a block."""
    around: int = 0
    """How many blocks a query sees on either side of its own."""

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
    """How many positions every query sees."""

    def validate(self):
        self.require(self.count >= 1, "count", "at least 1")

    def __call__(self, query, key):
        return key.position < self.count

    def reach(self):
        return Reach(self.count, 0)


@dataclasses.dataclass(frozen=True)
class Global(Mask):
    """The first `count` positions see all and are seen by all. Beltagy et al., Longformer (2004.05150), section 3.1,
    "global attention"; Zaheer et al., BigBird (2007.14062), section 2, "internal transformer construction"."""

    count: int
    """How many positions are global."""

    def validate(self):
        self.require(self.count >= 1, "count", "at least 1")

    def __call__(self, query, key):
        return (query.position < self.count) | (key.position < self.count)

    def reach(self):
        return Reach(self.count, 0)  # what is no later than a global query is global


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Query and key both lie in the first `length` positions: `Causal() | Prefix(n)` is the prefix language model of
    Raffel et al., T5 (1910.10683), section 3.2.1."""

    length: int
    """Positions of the prefix."""

    def validate(self):
        self.require(self.length >= 1, "length", "at least 1")

    def __call__(self, query, key):
        return (query.position < self.length) & (key.position < self.length)

    def reach(self):
        return Reach(self.length, 0)


@dataclasses.dataclass(frozen=True)
class QueryModality(Mask):
    """The query is of one modality. That audio (2) sees no images (1) is `~(QueryModality(2) & KeyModality(1))`."""

    number: int
    """The modality: 0 is text, adapters count from 1 in the model's order."""

    def validate(self):
        self.require(self.number >= 0, "number", "at least 0")

    def __call__(self, query, key):
        return query.modality == self.number


@dataclasses.dataclass(frozen=True)
class KeyModality(Mask):
    """The key is of one modality."""

    number: int
    """The modality: 0 is text, adapters count from 1 in the model's order."""

    def validate(self):
        self.require(self.number >= 0, "number", "at least 0")

    def __call__(self, query, key):
        return key.modality == self.number


DECODER = SameSegment() & (Causal() | SameSpan())
"""What a decoder's positions see: their own example, up to themselves and all of their own span."""
ENCODER = SameSegment()
"""What a media tower's positions see: all of their own item."""


def allowed(mask: Mask, query: Meta, key: Meta) -> jax.Array:
    """The predicate as a dense array, bool [B, Tq, Tk]. Padding keys are never allowed, whatever the predicate says."""
    rows = jax.tree.map(lambda x: x[:, :, None], query)
    columns = jax.tree.map(lambda x: x[:, None, :], key)
    visible = mask(rows, columns) & (columns.segment > 0)
    return jnp.broadcast_to(visible, (*query.segment.shape, key.segment.shape[1]))
