"""SIGTERM and SIGINT ask a run to save and end."""

import contextlib
import itertools
import signal
import sys
import threading

import jax

from polygpt.runtime import processes

_runs = itertools.count()


class Interrupted(BaseException):
    """A signal has ended an evaluation. What handles errors must not handle it: it is no `Exception`."""


class Interruption:
    """While entered, the first SIGTERM or SIGINT sets `requested`; a second SIGINT interrupts at once.

    Signals reach the main thread alone: elsewhere this does nothing. Where several processes train, one that gets a
    signal ends them all, after the same step.

    Args:
        says: what is done about a signal, for a person.
    """

    def __init__(self, says: str = "saving after this step"):
        self.requested, self._says = False, says
        self._before = {}
        self._name = f"stop {next(_runs)}"  # all processes train the same runs in the same order
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
        """Whether the run ends here, this process having begun so many steps; to be asked before each.

        A batch of an evaluation counts as a step: all processes take part in it, and none goes on before it is done.

        Of several processes, the one with a signal tells the others to end two steps later, and all come to know in
        time. For no process begins step n + 2 before step n is done, and step n is not done before all have begun it:
        while one has begun n steps, no other has begun more than n + 2, and to begin n + 3 it would have to ask after
        that one had gone on, and so had told it.
        """
        if jax.process_count() == 1:
            return self.requested
        if self._last is None:
            if self.requested:
                processes.tell(self._name, str(begun + 2))
            told = processes.told(self._name)
            self._last = None if told is None else int(told)
        return self._last is not None and begun >= self._last

    def _handle(self, number, _) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):  # who would have read it may have ended, and so have sent the signal
            print(f"{signal.Signals(number).name}: {self._says}", file=sys.stderr, flush=True)
