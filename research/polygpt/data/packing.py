"""Rows of positions: packing several examples into a row, and padding rows to a batch.

A row has t positions before it is padded to T = `seq_len`. Axis letters are those of `polygpt.sequence`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from polygpt.sequence import PADDING, Batch, Media

_ONE_NUMBER = ("tokens", "modality", "slot", "position", "segment", "span", "target", "weight")
POSITION_ARRAYS = {name: f"{name}_BT" for name in _ONE_NUMBER} | {"coordinate": "coordinate_BT3"}
"""The name of each array in a batch, by its name in a row."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The arrays of a row without padding; `Batch` explains their meaning.

    Attributes:
        tokens, modality, slot, position, segment, span, target: int32 [t].
        weight: float32 [t].
        coordinate: int32 [t, 3].
        media: by adapter name, (features, number of positions) of each item.
        extra: by name, arrays [t, ...], the same for all rows of a batch.
    """

    tokens: np.ndarray
    modality: np.ndarray
    slot: np.ndarray
    position: np.ndarray
    segment: np.ndarray
    span: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    coordinate: np.ndarray
    media: Mapping[str, Sequence[tuple[np.ndarray, int]]]
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


def pack(rows: Sequence[Row], adapters: Mapping) -> Row:
    """Packs rows into one: renumbers segments, and shifts slots to the new indices of their items.

    Args:
        rows: at least one.
        adapters: the model's adapters by name, in order; uses `positions`, the largest number of positions per item.
    """
    if len(rows) == 1:
        return rows[0]
    slots, segments, count = [], [], 0
    media = {name: [] for name in adapters}
    for row in rows:
        slot = row.slot
        for number, (name, adapter) in enumerate(adapters.items(), start=1):
            if media[name]:
                slot = slot + np.where(row.modality == number, np.int32(len(media[name]) * adapter.positions), 0)
            media[name] += row.media.get(name, ())
        slots.append(slot)
        segments.append(row.segment + np.int32(count))
        count += int(row.segment[-1])
    joined = {name: np.concatenate([getattr(row, name) for row in rows]) for name in POSITION_ARRAYS}
    joined |= {"slot": np.concatenate(slots), "segment": np.concatenate(segments)}
    extra = {name: np.concatenate([row.extra[name] for row in rows]) for name in rows[0].extra}
    return Row(**joined, media=media, extra=extra)


def collate(rows: Sequence[Row], seq_len: int, adapters: Mapping) -> Batch:
    """Pads rows to a batch [len(rows), seq_len]; None stands for a row of padding.

    Args:
        rows: rows with at most `seq_len` positions and `items` items per modality.
        seq_len: T.
        adapters: the model's adapters by name, in order; uses `features.shape` and `items`.
    """
    B = len(rows)
    arrays = {name: np.zeros((B, seq_len), np.int32) for name in POSITION_ARRAYS}
    arrays["modality"] = np.full((B, seq_len), PADDING, np.int8)
    arrays["weight"] = np.zeros((B, seq_len), np.float32)
    arrays["coordinate"] = np.zeros((B, seq_len, 3), np.int32)
    media = {
        name: Media(np.zeros((B, a.items, *a.features.shape), np.float32), np.zeros((B, a.items), np.int32))
        for name, a in adapters.items()
    }
    like = next((row.extra for row in rows if row is not None), {})
    extra = {name: padding((B, seq_len, *array.shape[1:]), array.dtype) for name, array in like.items()}
    for b, row in enumerate(rows):
        if row is None:
            continue
        for name, array in row.extra.items():
            extra[name][b, : len(row)] = array
        for name in POSITION_ARRAYS:
            arrays[name][b, : len(row)] = getattr(row, name)
        for name, items in row.media.items():
            for n, (features, positions) in enumerate(items):
                media[name].features[b, n] = features
                media[name].length_BN[b, n] = positions
    return Batch(**{POSITION_ARRAYS[name]: array for name, array in arrays.items()}, media=media, extra=extra)


def padding(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of `Batch.extra` with nothing in it: NaN, or zeros if its numbers are whole."""
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 0, dtype)


class Packer:
    """Fills the rows of a batch: each example goes into the first row that has room for it (first fit).

    A row has room if neither its positions nor its items of any modality would exceed their bounds. A new Packer always
    accepts at least `batch_size` examples: in the worst case, each gets its own row.
    """

    def __init__(self, batch_size: int, seq_len: int, adapters: Mapping, packing: bool):
        """Args: packing: whether a row may contain more than one example."""
        self.adapters, self.seq_len, self.packing = adapters, seq_len, packing
        self.items = {name: adapter.items for name, adapter in adapters.items()}
        self.rows: list[list[Row]] = [[] for _ in range(batch_size)]
        self.positions = [0] * batch_size
        self.used = [dict.fromkeys(adapters, 0) for _ in range(batch_size)]

    @property
    def closed(self) -> bool:
        """Whether not even a short example can be added."""
        return not self.packing and all(self.rows)

    def add(self, row: Row) -> bool:
        """Adds an example. Returns False if no row has room."""
        for b, within in enumerate(self.rows):
            if within and not self.packing or self.positions[b] + len(row) > self.seq_len:
                continue
            used = self.used[b]
            if any(used[name] + len(items) > self.items[name] for name, items in row.media.items()):
                continue
            within.append(row)
            self.positions[b] += len(row)
            for name, items in row.media.items():
                used[name] += len(items)
            return True
        return False

    def batch(self) -> Batch:
        """The rows, packed and padded."""
        packed = [pack(within, self.adapters) if within else None for within in self.rows]
        return collate(packed, self.seq_len, self.adapters)
