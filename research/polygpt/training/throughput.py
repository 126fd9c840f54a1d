"""Seconds per step, tokens per second, and the share of time spent waiting for input."""

import time

from polygpt.training.prefetch import Fed


class Throughput:
    """Counts steps from one `restart` to the next.

    Args:
        data_shards: number of process groups that read different rows.
    """

    def __init__(self, data_shards: int):
        self._data_shards = data_shards
        self._begin: float | None = None

    def restart(self) -> None:
        """Starts counting."""
        self._begin, self._steps, self._tokens, self._waited = time.perf_counter(), 0, 0, 0.0

    def waited(self, seconds: float) -> None:
        """Adds the wait for a batch. Counted immediately, because the step on that batch may end after a `restart`."""
        if self._begin is not None:
            self._waited += seconds

    def finished(self, fed: Fed) -> None:
        """Counts a finished step. The first step of a process, mostly compilation, is excluded."""
        if self._begin is None:
            self.restart()
            return
        self._steps += 1
        self._tokens += fed.tokens * self._data_shards

    def timing(self) -> dict[str, float]:
        """The values for `Logger.timing`; {} before a step was counted."""
        if self._begin is None or self._steps == 0:
            return {}
        seconds = time.perf_counter() - self._begin
        return {
            "seconds": seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "input_wait": self._waited / seconds,
        }
