"""The rows on which variants are checked: packed examples, bidirectional spans, three modalities, and padding.

All layouts have the same shape, so that one compiled program serves all of them. An example is the same in every
layout; `Rows.by_example` brings the results of two layouts into the same order.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np

from polygpt.attention.meta import Meta
from polygpt.sequence import PADDING, TEXT

LEAST = 24
"""Minimum number of positions for the layouts below."""
CALLS = (12, 4)
"""How to fill a cache: 12 positions at once, then 4, the rest one by one. Spans never cross a call."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A packed example.

    Attributes:
        seed: the seed of its vectors, which also identifies it.
        length: number of positions.
        media: (start, stop, modality, whether it is a bidirectional span), in positions of the example.
    """

    seed: int
    length: int
    media: tuple[tuple[int, int, int, bool], ...] = ()

    def part(self, start: int, stop: int | None = None) -> "Part":
        """A range of its positions."""
        return Part(self, start, self.length if stop is None else stop)


@dataclasses.dataclass(frozen=True)
class Part:
    """Positions `start` to `stop` of an example; there may be padding between two parts."""

    example: Example
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the layout.

    Attributes:
        x_BTD: float32 vectors; zeros at padding.
        meta: NumPy arrays [B, T], with the labels that the variant reads.
        seed_BT: the seed of the example at each position; -1 is padding.
    """

    x_BTD: np.ndarray
    meta: Meta
    seed_BT: np.ndarray

    @property
    def padding_BT(self) -> np.ndarray:
        """bool, whether the position is padding."""
        return self.seed_BT < 0

    def by_example(self, y_BTD) -> np.ndarray:
        """The results of all examples ordered by seed, [positions, D], without padding."""
        order = np.lexsort((self.meta.position.ravel(), self.seed_BT.ravel()))
        return np.asarray(y_BTD).reshape(order.size, -1)[order[self.padding_BT.sum() :]]

    def with_garbage(self) -> "Rows":
        """The same layout with large vectors at padding."""
        garbage = np.float32(10 * np.random.default_rng(99).normal(size=self.x_BTD.shape))
        return dataclasses.replace(self, x_BTD=np.where(self.padding_BT[..., None], garbage, self.x_BTD))

    def padded(self, more: int) -> "Rows":
        """The same layout with `more` padding positions per row."""
        B, T = self.seed_BT.shape
        longer = lay_out([[]] * B, T + more, self.x_BTD.shape[2], self.meta.extra)

        def joined(old, new):
            return np.concatenate([old, new[:, T:]], axis=1)

        meta = jax.tree.map(joined, self.meta, longer.meta)
        return Rows(joined(self.x_BTD, longer.x_BTD), meta, joined(self.seed_BT, longer.seed_BT))

    def row(self, b: int) -> "Rows":
        """A single row."""
        return Rows(*jax.tree.map(lambda array: array[b : b + 1], (self.x_BTD, self.meta, self.seed_BT)))


def made_up(meta: Meta, labels: Iterable[str]) -> dict[str, np.ndarray]:
    """Labels 0 and 1 in turn for the positions of an example, int32 [B, T] by name.

    Every position has near ones of either label on both sides, so that masks that compare labels hide only some.
    """
    padding_BT, position_BT = np.asarray(meta.segment) == 0, np.asarray(meta.position)
    return {name: np.where(padding_BT, -1, (position_BT + i) % 2).astype(np.int32) for i, name in enumerate(labels)}


def lay_out(rows: list[list[Example | Part | int]], length: int, width: int, labels: Iterable[str] = ()) -> Rows:
    """Rows of examples, parts of examples, and numbers of padding positions; padded at the end up to `length`."""
    B = len(rows)
    x_BTD = np.zeros((B, length, width), np.float32)
    names = ("position", "segment", "span", "modality", "seed")
    array = {name: np.full((B, length), {"modality": PADDING, "seed": -1}.get(name, 0), np.int32) for name in names}
    for b, row in enumerate(rows):
        t, segment, before = 0, 0, None
        for item in row:
            if isinstance(item, int):
                t += item
                continue
            part = item.part(0) if isinstance(item, Example) else item
            example, here = part.example, slice(t, t + part.stop - part.start)
            segment, before, t = segment + (example is not before), example, here.stop
            media = {"span": np.zeros(example.length), "modality": np.full(example.length, TEXT)}
            for number, (start, stop, modality, span) in enumerate(example.media, start=1):
                media["modality"][start:stop] = modality
                media["span"][start:stop] = 10 * segment + number if span else 0
            for name, values in media.items():
                array[name][b, here] = values[part.start : part.stop]
            array["position"][b, here] = np.arange(part.start, part.stop)
            array["segment"][b, here], array["seed"][b, here] = segment, example.seed
            vectors = np.random.default_rng(example.seed).normal(size=(example.length, width))
            x_BTD[b, here] = vectors[part.start : part.stop]
    index_BT = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int32)[None], (B, length)))
    meta = Meta(index_BT, *(array[name] for name in names[:4]))
    return Rows(x_BTD, dataclasses.replace(meta, extra=made_up(meta, labels)), array["seed"])


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The layouts used by the properties, with T positions each.

    Attributes:
        packed: one to three examples per row, no padding.
        permuted: the same examples in other places.
        compact: other examples, padding only at the end.
        ragged: the examples of `compact` as in generation: padded prompts, and rows that pause while others continue.
        masked: a row without any example, and rows that are half padding.
    """

    packed: Rows
    permuted: Rows
    compact: Rows
    ragged: Rows
    masked: Rows


def layouts(T: int, width: int, labels: Iterable[str] = ()) -> Layouts:
    """All layouts, for vectors of `width` channels, with these labels."""
    short, spanned = Example(1, 5), Example(2, 10, ((1, 5, 1, True),))
    heard = Example(3, T - 15, ((2, 5, 2, False),))
    whole = Example(4, T, ((2, 6, 1, True), (14, 18, 2, False)))
    first, second = Example(5, 12, ((0, 4, 2, True),)), Example(6, T - 12, ((0, 3, 1, True), (6, 8, 2, False)))
    behind = Example(7, T - 8, ((1, 5, 1, True), (9, 11, 2, False)))
    ahead = Example(8, T - 2, ((5, 8, 2, False), (12, 15, 1, True)))
    brief, paused = Example(9, 3), Example(10, T - 8, ((1, 4, 2, True), (7, 10, 1, True)))

    def rows(*items):
        return lay_out(list(items), T, width, labels)

    return Layouts(
        packed=rows([short, spanned, heard], [whole], [first, second]),
        permuted=rows([second, first], [spanned, heard, short], [whole]),
        compact=rows([behind], [ahead], [brief, paused]),
        ragged=rows(
            [behind.part(0, 8), 4, behind.part(8)],
            [ahead.part(0, T - 6), 2, ahead.part(T - 6)],
            [brief, paused.part(0, 7), 2, paused.part(7, 10), 1, paused.part(10)],
        ),
        masked=rows([short, spanned], [], [3, first]),
    )
