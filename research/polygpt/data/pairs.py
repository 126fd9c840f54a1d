"""Pairs of a preferred and a rejected answer to the same prompt, two segments of a row, and what stands beside them."""

import dataclasses

import numpy as np

from polygpt.data.example import Example
from polygpt.data.packing import POSITION_ARRAYS, Row
from polygpt.errors import BadRecord
from polygpt.sequence import FIRST, PREFERENCE


def require_answers(preferred: str | None, rejected: str | None, place: str) -> None:
    """Raises BadRecord unless there are two answers that differ."""
    for name, answer in (("preferred", preferred), ("rejected", rejected)):
        if answer is None or not answer.strip():
            raise BadRecord(f"no {name} answer", place, "a pair has two: add it, or remove the record")
    if preferred == rejected:
        raise BadRecord("equal answers", place, f"the preferred and the rejected one are both {preferred!r}")


def rejected(example: Example) -> Example:
    """The example with its rejected answer. Raises BadRecord if it is no pair."""
    if example.rejected is None:
        remedy = "a pair has two: add it, remove the record, or set `paired` of its task to false"
        raise BadRecord("no rejected answer", example.place, remedy)
    require_answers(example.answer, example.rejected, example.place)
    return example.with_rejected


def joined(preferred: Row, rejected: Row) -> Row:
    """The rows of the two answers as one row of two segments. Both refer to the media of the prompt, which it has once.

    Args:
        preferred: a row with labels and weights of its own, also for the prompt.
        rejected: a row whose prompt has no loss weight.
    """
    begin = int(np.argmax(rejected.weight > 0))  # in both, because the prompts are equal
    marks = ((preferred.weight > 0) & (np.arange(len(preferred)) >= begin)).astype(np.int32)
    marks[marks.argmax()] = FIRST
    arrays = {name: [getattr(row, name) for row in (preferred, rejected)] for name in POSITION_ARRAYS}
    arrays["segment"] = [preferred.segment, rejected.segment + 1]
    arrays["weight"] = [preferred.weight, np.zeros_like(rejected.weight)]
    extra = {name: [preferred.extra[name], rejected.extra[name]] for name in preferred.extra}
    extra[PREFERENCE] = [marks, -(rejected.weight > 0).astype(np.int32)]
    extra = {name: np.concatenate(both) for name, both in extra.items()}
    return dataclasses.replace(preferred, **{k: np.concatenate(both) for k, both in arrays.items()}, extra=extra)


def single(row: Row) -> Row:
    """The row of an example that is no pair, beside rows that are."""
    return dataclasses.replace(row, extra={**row.extra, PREFERENCE: np.zeros(len(row), np.int32)})
