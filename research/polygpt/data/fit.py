"""The requirements of records on layout and adapters, and the smallest settings that accept a fraction of them."""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from polygpt.data.example import Example, Medium
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.packing import Row
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import BadRecord

LONGEST = 600.0
"""No setting is suggested for recordings longer than this many seconds: they should be cut instead."""
UNBOUNDED = 2**31 - 1


def columns(adapters: Mapping) -> list[str]:
    """The names of a record's requirements: `length`, and by adapter such as `image.items` and `audio.seconds`."""
    timed = [name for name, adapter in adapters.items() if _timed(adapter)]
    return ["length", *(f"{name}.items" for name in adapters), *(f"{name}.seconds" for name in timed)]


def need(row: Row, frames: Mapping[str, int], adapters: Mapping) -> list[float]:
    """The requirements of one record, in the order of `columns`.

    Args:
        row: the row of the record.
        frames: by adapter, the number of real feature frames of its longest item.
        adapters: by modality.
    """
    items = [len(row.media.get(name, ())) for name in adapters]
    seconds = [_seconds(adapter, frames.get(name, 0)) for name, adapter in adapters.items() if _timed(adapter)]
    return [len(row), *items, *seconds]


def need_beyond(example: Example, layout: LayoutSpec, tokenizer: Tokenizer, adapters: Mapping) -> list[float] | None:
    """The requirements of a record that is too long or has too many media; None if no setting would accept it."""
    try:
        relaxed = {name: _relaxed(name, adapter, example) for name, adapter in adapters.items()}
        watched = {name: FrameCounter(adapter) for name, adapter in relaxed.items()}
        row = lay_out(example, layout.replace(seq_len=UNBOUNDED), tokenizer, watched, paired=False)
    except ValueError:  # a bad record, or an adapter whose fields do not allow it
        return None
    return need(row, {name: adapter.frames for name, adapter in watched.items()}, adapters)


class FrameCounter:
    """Wraps an adapter and records the largest number of real frames among the items laid out."""

    def __init__(self, adapter):
        self.adapter, self.frames = adapter, 0

    def __getattr__(self, name: str):
        return getattr(self.adapter, name)

    def length(self, frames: int) -> int:
        self.frames = max(self.frames, frames)
        return self.adapter.length(frames)


def smallest(needs: np.ndarray, share: float) -> np.ndarray:
    """The smallest bounds [columns] that contain a fraction of the records [records, columns].

    All columns are bounded at the same quantile of their non-zero requirements, so that a rare modality keeps its
    fraction too: the lowest quantile at which enough records are within all bounds.
    """
    needing = [np.sort(column[column > 0]) for column in needs.T]

    def within(rank: int) -> np.ndarray:
        bounds = [some[-(-rank * len(some) // len(needs)) - 1] if len(some) else 0 for some in needing]
        return (needs <= bounds).all(axis=1)

    enough = max(1, math.ceil(share * len(needs) - 1e-6))
    rank = bisect.bisect_left(range(len(needs)), enough, enough, key=lambda rank: int(within(rank).sum()))
    return needs[within(rank)].max(axis=0)


def row_length(length: int, layout: LayoutSpec) -> int:
    """The row length for records of up to `length` positions: a multiple of 8, or the current length.

    With packing, rows are never shortened, because a long row holds several examples.
    """
    wanted = math.ceil(length / 8) * 8
    return wanted if length > layout.seq_len or not layout.packing and wanted < layout.seq_len else layout.seq_len


def filling(needs: np.ndarray, seq_len: int, adapters: Mapping) -> dict[str, int]:
    """The items per row, by adapter, with which the positions and not the items bound how many examples share a row.

    A row holds seq_len / mean length examples. Towers compute every item that a row may hold, used or not: an adapter
    whose media do not occur gets the smallest number, 1.

    Args:
        needs: the requirements of records [records, columns].
        seq_len: T, positions per row.
        adapters: the current adapters.
    """
    length, *items = needs.mean(axis=0)
    return {name: max(1, round(seq_len / length * mean)) for name, mean in zip(adapters, items, strict=False)}


def adapter_settings(
    bounds: Mapping[str, float], adapters: Mapping, full: Mapping[str, int] | None = None
) -> dict[str, int | float]:
    """The adapter fields to change, by dotted name, to accept records within bounds.

    Args:
        bounds: the bounds, by the names of `columns`.
        adapters: the current adapters.
        full: items per row that fill packed rows, see `filling`; None where no examples share a row. Adapters whose
            media do not occur are then left unchanged.
    """
    wanted: dict[str, int | float] = {}
    for name, adapter in adapters.items():
        if items := max(int(bounds[f"{name}.items"]), full[name] if full else 0):
            wanted |= {f"model.adapters.{name}.items": items} if items != adapter.items else {}
            seconds = math.ceil(100 * bounds.get(f"{name}.seconds", 0)) / 100
            if seconds and seconds != adapter.features.seconds:
                wanted[f"model.adapters.{name}.features.seconds"] = seconds
    return wanted


def _timed(adapter) -> bool:
    return all(hasattr(adapter.features, field) for field in ("seconds", "rate", "hop"))


def _seconds(adapter, frames: int) -> float:
    """An upper bound on the duration of an item with `frames` frames: its samples do not fill another hop."""
    return (frames + 1) * adapter.features.hop / adapter.features.rate if frames else 0.0


def _relaxed(name: str, adapter, example: Example):
    """The adapter with bounds that accept the example's media.

    Raises:
        ValueError: if no bounds do.
    """
    media: Sequence[Medium] = [part for part in example.parts if isinstance(part, Medium) and part.modality == name]
    changes = {"items": max(1, len(media))}
    if _timed(adapter) and media:
        longest = dataclasses.replace(adapter.features, seconds=max(LONGEST, adapter.features.seconds))
        samples = max(len(longest.decode(medium.source, example.place)) for medium in media)
        changes["features"] = dataclasses.replace(longest, seconds=samples / adapter.features.rate)
    return dataclasses.replace(adapter, **changes)


def fixable_by_settings(fault: BadRecord) -> bool:
    """Whether larger rows or adapters might accept a faulty record."""
    return fault.reason in ("too long", "too many media")
