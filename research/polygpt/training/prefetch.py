"""Prepares batches and sends them to the device in a thread while the device computes."""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from polygpt import sequence
from polygpt.errors import UserError
from polygpt.sequence import Batch

GRACE = 10.0
"""Seconds that a source has to finish reading when the run ends."""
POLL = 0.2
"""Seconds between checks whether to keep waiting for a batch."""
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch on the device.

    Attributes:
        batch: placed as the step expects it.
        state: the iterator's state right after this batch, regardless of prefetched batches.
        examples: its examples, if they are logged; see `TrainBatches.last_examples`.
        tokens: non-padding positions in this process.
        waited: seconds that the loop waited for it.
    """

    batch: Batch
    state: dict[str, Any]
    examples: tuple[tuple[str, int, int], ...]
    tokens: int
    waited: float = 0.0


class Checks:
    """Checks a first NumPy batch fully, and the token ids of all others, which a device would clip silently.

    Args:
        vocabulary, positions: see `sequence.check`.
    """

    def __init__(self, vocabulary: int, positions: dict[str, int]):
        self._vocabulary, self._positions, self._checked = vocabulary, positions, False

    def __call__(self, batch: Batch) -> None:
        """Raises UserError for an invalid batch, [B, T] or [seeds, B, T]."""
        if self._checked and sequence.ids_in_range(batch, self._vocabulary):
            return
        seeds = len(batch.tokens_BT) if batch.tokens_BT.ndim == 3 else 0
        for one in [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(seeds)] or [batch]:
            sequence.check(one, self._vocabulary, self._positions)
        self._checked = True


class Prefetch:
    """Keeps up to `ahead` batches ready.

    Args:
        batches: an iterator with `get_state()`, `last_examples` and `close()`; owned by the thread from here on.
        put: sends a NumPy batch to the device.
        check: called with every batch; its exceptions propagate to the caller who takes that batch.
        ahead: number of batches to prepare in advance.
    """

    def __init__(self, batches: Iterator[Batch], put: Callable, check: Callable[[Batch], None], ahead: int = 2):
        self._batches, self._put, self._check = batches, put, check
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self, stop: Callable[[], bool] = lambda: False) -> Fed | None:
        """The next batch, or None if `stop()` becomes true first. Raises what the iterator or check raised."""
        begin = time.perf_counter()
        while True:
            with contextlib.suppress(queue.Empty):
                item = self._ready.get(timeout=POLL)
                break
            if stop():
                return None
        if isinstance(item, BaseException):
            raise item
        return dataclasses.replace(item, waited=time.perf_counter() - begin)

    @property
    def ready(self) -> bool:
        """Whether the next batch is ready."""
        return not self._ready.empty()

    def close(self) -> bool:
        """Ends the thread and the iterator's workers; True if the iterator may be used again.

        A source that hangs is abandoned, along with its thread and the iterator, which that thread still owns.
        """
        self._stop.set()
        deadline = time.monotonic() + GRACE
        while self._thread.is_alive():  # it may be waiting for room in the queue
            if time.monotonic() > deadline:
                log.warning("the data source did not yield its next batch within %.0f s: abandoning it", GRACE)
                return False
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
        self._batches.close()
        return True

    def _run(self) -> None:
        try:
            for batch in self._batches:
                self._check(batch)
                tokens = int(np.count_nonzero(batch.segment_BT))
                state, examples = self._batches.get_state(), self._batches.last_examples
                self._ready.put(Fed(self._put(batch), state, examples, tokens))
                if self._stop.is_set():
                    return
            raise UserError("the training data ended: a training iterator must be endless")
        except BaseException as error:  # raised in the next `take`
            self._ready.put(error)
