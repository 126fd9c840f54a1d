"""A watchdog: when no step finishes any more, it says what every thread is doing."""

import collections
import contextlib
import dataclasses
import faulthandler
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import jax

from polygpt.runtime import processes
from polygpt.runtime.goodput import CATEGORIES, Goodput
from polygpt.runtime.liveness import leave
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class WatchdogSpec(Spec):
    """When a run counts as stuck, and what is done then."""

    factor: float = 20.0
    """How many times the median step a step may take."""
    minimum: float = 300.0
    """Seconds that a step may take in any case."""
    compile: float = 3600.0
    """Seconds that starting up, and then compiling the step, may take."""
    checkpoint: float = 1800.0
    """Seconds that saving, or going back to a checkpoint, may take."""
    evaluation: float = 7200.0
    """Seconds that an evaluation may take."""
    action: Literal["log", "exit"] = "log"
    """log: the stacks of all threads are written down, and training waits on. exit: then the process ends with code 1,
    so that whoever started it can start it again."""

    def validate(self):
        self.require(self.factor > 1, "factor", "above 1")
        for name in ("minimum", "compile", "checkpoint", "evaluation"):
            self.require(getattr(self, name) > 0, name, "positive")


class Watchdog:
    """Watches from a thread while it is entered.

    Args:
        spec: when and what.
        goodput: the clock that knows what the loop is doing.
        workdir: the run folder, in which the stacks are written.
    """

    def __init__(self, spec: WatchdogSpec, goodput: Goodput, workdir: Path):
        self.spec, self._goodput, self._workdir = spec, goodput, workdir
        self._own = {
            "startup": spec.compile,
            "restart": spec.compile,
            "compile": spec.compile,
            "checkpoint": spec.checkpoint,
            "lost": spec.checkpoint,
            "evaluation": spec.evaluation,
        }
        self._step, self._since = None, goodput.now()
        self._taken: collections.deque[float] = collections.deque(maxlen=100)
        self._reported = 0.0  # seconds of this halt at the last report
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def finished(self, step: int) -> None:
        """A step has finished."""
        now = self._goodput.now()
        if self._step is not None:  # the first step of a process is mostly compilation
            self._taken.append(now - self._since)
        self._step, self._since = step, now

    def rest(self) -> None:
        """Something else than a step has finished: the next step counts from here."""
        self._since = self._goodput.now()

    def halt(self) -> tuple[float, float]:
        """(seconds for which nothing has finished, seconds that it may take)."""
        own = self._own.get(self._goodput.activity)
        if own is not None:
            return self._goodput.now() - self._goodput.since, own
        median = statistics.median(self._taken) if self._taken else 0.0
        return self._goodput.now() - self._since, max(self.spec.minimum, self.spec.factor * median)

    def _watch(self) -> None:
        pause = min(5.0, self.spec.minimum / 4)
        while not self._closing.wait(pause):
            self._goodput.touch()  # a process that hangs is alive: its time is lost, and no restart
            seconds, patience = self.halt()
            self._reported = self._reported if seconds > self._reported else 0.0
            if seconds > max(patience, 2 * self._reported):  # reported anew when it has lasted twice as long
                self._reported = seconds
                self._report(seconds, patience)
            with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be no file
                # A library that hangs without giving Python's lock back holds this thread up too: a dump is ordered in
                # advance, and put off as long as this thread comes round.
                faulthandler.dump_traceback_later(patience + 2 * pause, file=sys.stderr.fileno())

    def _report(self, seconds: float, patience: float) -> None:
        rank, now = jax.process_index(), time.strftime("%Y%m%d-%H%M%S")
        place = self._workdir / f"stacks-{rank}-{now}.txt"
        lines = [
            f"process {rank}: nothing has finished for {seconds:.0f} s, and train.watchdog allows {patience:.0f} s",
            f"last step: {'none yet' if self._step is None else self._step}",
            f"doing: {CATEGORIES[self._goodput.activity]}",
            f"last barrier: {processes.last_barrier() or 'none'}",
        ]
        try:
            with place.open("w", encoding="utf-8") as file:
                print(*lines, sep="\n", end="\n\n", file=file, flush=True)
                faulthandler.dump_traceback(file)
            text = place.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            text = "\n".join([*lines, f"the stacks cannot be written: {error}"])
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(f"polygpt watchdog: {text}", file=sys.stderr, flush=True)
        if self.spec.action == "exit":
            leave(1)
