"""Resharding: assigns the positions of the tasks' endless streams to data shards.

Data shards are the processes, or groups of processes, that read different rows of a batch. When their number changes,
the positions of every task are reassigned (`reshard` in mixture.py): first those that the earlier data shards did not
deliver, then all positions from the frontier on. An epoch therefore contains every example once, even if a run resumes
on a different number of machines.
"""

import base64
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Resharding:
    """Assigns the positions of each task to data shards in turn, one position at a time.

    Attributes:
        data_shards: number of data shards.
        start: the index into the stream of each data shard from which this resharding applies; the mixture continues
            there.
        frontier: by task, the first position that no data shard had drawn when the resharding began; 0 by default.
        left: by task, the positions before the frontier that no batch contained at that time; int64 [n], ascending.
    """

    data_shards: int = 1
    start: int = 0
    frontier: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def position(self, task: str, nth: int) -> int:
        """The nth position of a task that is assigned to a data shard."""
        left = self.left.get(task, ())
        return int(left[nth]) if nth < len(left) else self.frontier.get(task, 0) + nth - len(left)

    def to_json(self) -> dict[str, Any]:
        """JSON data. `left` becomes a compressed bitmap, because leftovers of slow data shards are evenly spaced."""
        left = {task: [int(some[0]), _compressed(some - some[0])] for task, some in self.left.items() if len(some)}
        return {"data_shards": self.data_shards, "start": self.start, "frontier": dict(self.frontier), "left": left}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Resharding":
        """The inverse of `to_json`."""
        return cls(**{**data, "left": {task: first + _expanded(bits) for task, (first, bits) in data["left"].items()}})


def _compressed(numbers: np.ndarray) -> str:
    """Ascending numbers that begin with 0, encoded as a string."""
    bits = np.zeros(numbers[-1] + 1, bool)
    bits[numbers] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


def _expanded(text: str) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)))
