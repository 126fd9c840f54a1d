"""The division: which positions of the tasks' endless streams are dealt out to which feeder.

Feeders are the processes, or groups of processes, that read different rows of a batch. When their number changes, every
task's positions are dealt out anew (`divide_anew` in mixture.py): first those that the feeders so far have not
delivered, then all from the frontier on. So an epoch has every example once, whatever a run was continued on.
"""

import base64
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Division:
    """How the stream of each task is dealt out: one position at a time, to one feeder after the other.

    Attributes:
        feeders: how many there are.
        start: the index into every feeder's stream from which on this holds; the mixture goes on from there.
        frontier: by task, the first position that nobody had drawn by then; 0 for tasks that are not in it.
        left: by task, the positions before it that were not in a batch by then, int64 [n], in ascending order.
    """

    feeders: int = 1
    start: int = 0
    frontier: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def position(self, task: str, nth: int) -> int:
        """The nth position that is dealt out of a task's stream."""
        left = self.left.get(task, ())
        return int(left[nth]) if nth < len(left) else self.frontier.get(task, 0) + nth - len(left)

    def to_json(self) -> dict[str, Any]:
        """As JSON data. Leftovers are a bit a position, compressed: those of slow feeders come at regular distances."""
        left = {task: [int(some[0]), _compressed(some - some[0])] for task, some in self.left.items() if len(some)}
        return {"feeders": self.feeders, "start": self.start, "frontier": dict(self.frontier), "left": left}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Division":
        """The inverse of `to_json`."""
        return cls(**{**data, "left": {task: first + _expanded(bits) for task, (first, bits) in data["left"].items()}})


def _compressed(numbers: np.ndarray) -> str:
    """Ascending numbers from 0 on, as a text."""
    bits = np.zeros(numbers[-1] + 1, bool)
    bits[numbers] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


def _expanded(text: str) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)))
