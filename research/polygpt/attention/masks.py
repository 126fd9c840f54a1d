"""The mask language: who may see whom, as a composable predicate over (query, key) metadata.

A predicate is written once, as `Causal() & SameSegment()`, and knows nothing of matrices. `allowed` lowers it to a
dense boolean array for any queries and keys, a decode step over a cache included.
"""

import dataclasses

import jax

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
    """The positions of its own example that a query may see at most: the `first` ones, and the `last` up to itself."""

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
        """How far back a query sees; None is without bound. A cache need not remember what lies beyond it."""
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
    right: Mask

    def __call__(self, query, key):
        return self.left(query, key) & self.right(query, key)


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """At least one holds."""

    left: Mask
    right: Mask

    def __call__(self, query, key):
        return self.left(query, key) | self.right(query, key)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """The inner one does not hold."""

    inner: Mask

    def __call__(self, query, key):
        return ~self.inner(query, key)


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


DECODER = SameSegment() & (Causal() | SameSpan())
"""What a decoder's positions see: their own example, up to themselves and all of their own span."""
ENCODER = SameSegment()
"""What a media tower's positions see: all of their own item."""


def allowed(mask: Mask, query: Meta, key: Meta) -> jax.Array:
    """The predicate as a dense array, bool [B, Tq, Tk]. Padding keys are never allowed, whatever the predicate says."""
    rows = jax.tree.map(lambda x: x[:, :, None], query)
    columns = jax.tree.map(lambda x: x[:, None, :], key)
    return mask(rows, columns) & (columns.segment > 0)
