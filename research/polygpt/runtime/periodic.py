"""Something to do every few minutes, at the same step in all processes."""

import itertools
import time
from collections.abc import Callable

import jax

from polygpt.runtime import processes

AHEAD = 4
"""How many steps before it is due the first process tells the others; they ask every so many steps."""
_made = itertools.count()


class Periodic:
    """Says after which step something is due again.

    The clock of the first process counts. When its time is over, it names a step AHEAD of its own. While it has begun n
    steps, no other process has begun more than n + 2 (see `Interruption.due`): each asks again before that step, and so
    all agree on it without waiting for each other.

    Args:
        minutes: from one time to the next; None for never.
        clock: seconds, for tests.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        self._minutes, self._clock = minutes, clock
        self._name, self._times = f"periodic {next(_made)}", 0  # all processes make theirs in the same order
        self.restart()

    def restart(self) -> None:
        """The minutes count from now."""
        self._since = self._clock()

    def due(self, begun: int) -> bool:
        """Whether it is due after this step, the process having begun so many; to be asked after each."""
        if self._minutes is None:
            return False
        late = self._clock() - self._since >= 60 * self._minutes
        if jax.process_count() == 1:
            return late
        if begun % AHEAD:
            return False
        name = f"{self._name} {self._times}"
        if late and jax.process_index() == 0:
            processes.tell(name, str(begun + AHEAD))
        told = processes.told(name)
        if told is None or begun < int(told):
            return False
        self._times += 1
        return True
