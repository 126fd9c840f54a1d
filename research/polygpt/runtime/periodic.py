"""Triggers an action every few minutes, at the same step in all processes."""

import itertools
import time
from collections.abc import Callable

import jax

from polygpt.runtime import processes

AHEAD = 4
"""Process 0 announces the step this many steps ahead; all processes check every this many steps."""
_made = itertools.count()


class Periodic:
    """Decides after which step an action is due again.

    The clock of process 0 decides. When the interval is over, process 0 publishes a step AHEAD of its own. While it has
    started n steps, no other process has started more than n + 2 (see `Interruption.due`), so each checks again before
    that step, and all agree without waiting for each other.

    Args:
        minutes: the interval; None for never.
        clock: returns seconds; for tests.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self._minutes, self._clock = minutes, clock
        self._name, self._times = f"periodic {next(_made)}", 0  # all processes create theirs in the same order
        self.restart()

    def restart(self) -> None:
        """Restarts the interval."""
        self._since = self._clock()

    def due(self, begun: int) -> bool:
        """Whether the action is due, given the number of steps that this process has started. Call after each step."""
        if self._minutes is None:
            return False
        late = self._clock() - self._since >= 60 * self._minutes
        if jax.process_count() == 1:
            return late
        if begun % AHEAD:
            return False
        name = f"{self._name} {self._times}"
        if late and jax.process_index() == 0:
            processes.publish(name, str(begun + AHEAD))
        due = processes.published(name)
        if due is None or begun < int(due):
            return False
        self._times += 1
        return True
