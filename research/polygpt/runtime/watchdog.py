"""A watchdog: dumps what every thread is doing when steps stop finishing."""

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
from polygpt.runtime.liveness import exit_now
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class WatchdogSpec(Spec):
    """When a run counts as stuck, and how to respond."""

    factor: float = 20.0
    """Limit for a step, as a multiple of the median step time."""
    minimum: float = 300.0
    """Minimum limit for a step, in seconds."""
    compile: float = 3600.0
    """Limit for starting up, and for compiling the step, in seconds."""
    checkpoint: float = 1800.0
    """Limit for saving a checkpoint or rewinding to one, in seconds."""
    evaluation: float = 7200.0
    """Limit for an evaluation, in seconds."""
    action: Literal["log", "exit"] = "log"
    """log: dump the stacks of all threads and keep waiting. exit: dump them and exit with code 1, so that a supervisor
    can restart the run."""

    def validate(self):
        self.require(self.factor > 1, "factor", "above 1")
        for name in ("minimum", "compile", "checkpoint", "evaluation"):
            self.require(getattr(self, name) > 0, name, "positive")


class Watchdog:
    """Watches from a thread while entered.

    Args:
        spec: limits and response.
        goodput: the clock, which knows what the loop is doing.
        workdir: the run folder, where stacks are written.
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
        self._reported = 0.0  # length of this halt at the last report, in seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def step_finished(self, step: int) -> None:
        """A step has finished."""
        now = self._goodput.now()
        if self._step is not None:  # the first step of a process is mostly compilation
            self._taken.append(now - self._since)
        self._step, self._since = step, now

    def restart_timer(self) -> None:
        """Something other than a step has finished: time the next step from here."""
        self._since = self._goodput.now()

    def stalled(self) -> tuple[float, float]:
        """(seconds since anything finished, limit in seconds)."""
        own = self._own.get(self._goodput.activity)
        if own is not None:
            return self._goodput.now() - self._goodput.since, own
        median = statistics.median(self._taken) if self._taken else 0.0
        return self._goodput.now() - self._since, max(self.spec.minimum, self.spec.factor * median)

    def _watch(self) -> None:
        pause = min(5.0, self.spec.minimum / 4)
        while not self._closing.wait(pause):
            self._goodput.touch()  # a hanging process is alive: its time counts as lost, not as down
            seconds, patience = self.stalled()
            self._reported = self._reported if seconds > self._reported else 0.0
            if seconds > max(patience, 2 * self._reported):  # report again when it has lasted twice as long
                self._reported = seconds
                self._report(seconds, patience)
            with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may not be a file
                # A library that hangs while holding the GIL blocks this thread too. So schedule a dump in advance, and
                # postpone it whenever this thread runs.
                faulthandler.dump_traceback_later(patience + 2 * pause, file=sys.stderr.fileno())

    def _report(self, seconds: float, patience: float) -> None:
        rank, now = jax.process_index(), time.strftime("%Y%m%d-%H%M%S")
        place = self._workdir / f"stacks-{rank}-{now}.txt"
        lines = [
            f"process {rank}: nothing has finished for {seconds:.0f} s; train.watchdog allows {patience:.0f} s",
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
            text = "\n".join([*lines, f"cannot write the stacks: {error}"])
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            print(f"polygpt watchdog: {text}", file=sys.stderr, flush=True)
        if self.spec.action == "exit":
            exit_now(1)
