"""SIGTERM and SIGINT make a run save and exit."""

import contextlib
import itertools
import signal
import sys
import threading

import jax

from polygpt.runtime import processes

_runs = itertools.count()


class Interrupted(BaseException):
    """A signal interrupted an evaluation. Not an `Exception`, so that error handlers do not catch it."""


class Interruption:
    """While entered, the first SIGTERM or SIGINT sets `requested`; a second SIGINT interrupts at once.

    Does nothing outside the main thread, which alone receives signals. With several processes, a signal to one ends
    them all after the same step.

    Args:
        says: message that describes the response to a signal.
    """

    def __init__(self, says: str = "saving after this step"):
        self.requested, self._says = False, says
        self._before = {}
        self._name = f"stop {next(_runs)}"  # all processes run the same runs in the same order
        self._last: int | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self, begun: int) -> bool:
        """Whether the run ends here, given the number of steps that this process has started. Call before each step.

        An evaluation batch counts as a step: all processes take part, and none continues before it is done. A process
        with a signal tells the others to stop two steps later, which all learn in time: no process starts step n + 2
        before step n is done, and step n is not done before all have started it. So while one process has started n
        steps, no other has started more than n + 2; to start step n + 3 it would have to call this after the first
        process had continued, and had therefore announced the stop.
        """
        if jax.process_count() == 1:
            return self.requested
        if self._last is None:
            if self.requested:
                processes.publish(self._name, str(begun + 2))
            stop_at = processes.published(self._name)
            self._last = None if stop_at is None else int(stop_at)
        return self._last is not None and begun >= self._last

    def _handle(self, number, _) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):  # stderr's reader may be gone, which may be why the signal came
            print(f"{signal.Signals(number).name}: {self._says}", file=sys.stderr, flush=True)
