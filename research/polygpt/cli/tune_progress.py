"""Progress of a search, on stderr: a line per finished trial and, on a terminal, a bar with running trials."""

import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from polygpt.ablation.tune import Search
from polygpt.ablation.tuning.run import Status
from polygpt.report.charts import figure


class Progress:
    """Called with the status of a search.

    Args:
        search: the search.
        seconds: between lines about running trials, without a terminal.
    """

    def __init__(self, search: Search, seconds: float = 10.0):
        # Keep this stderr, even while a trial's stderr is redirected.
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._search, self._seconds = search, seconds
        self._told: set[int] | None = None
        self._best, self._printed = None, -math.inf
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn()
        self._bar = Bar(*columns, console=self._console, transient=True) if self._console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._search.trials, now="")
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, status: Status) -> None:
        first, self._told = self._told is None, self._told or set()
        fresh = [trial for trial in status.finished if trial.number not in self._told]
        self._told |= {trial.number for trial in fresh}
        for trial in fresh:
            line = self._line(trial)
            if not first:
                self._say(line)
        if first and fresh:
            self._say(f"resuming after {len(fresh)} trials{self._so_far()}")
        now = "  ".join(f"{number}: {_at(note)}" for number, note in sorted(status.running.items()))
        if self._bar:
            self._bar.update(self._task, completed=len(status.finished), now=f"{now}{self._so_far()}")
        elif now and time.monotonic() - self._printed >= self._seconds:
            self._say(f"running {now}")

    def _line(self, trial) -> str:
        """Describes a finished trial, which may be the best so far."""
        values = ", ".join(
            f"{name} {figure(value) if isinstance(value, float) else value}" for name, value in trial.params.items()
        )
        words = f"trial {trial.number} ({len(self._told)} of {self._search.trials}): {values}: "
        if not (trial.values and trial.state.name == "COMPLETE"):
            return words + trial.user_attrs.get("reason", "pruned")
        sign = 1 if self._search.direction == "lower" else -1
        if self._best is None or sign * trial.values[0] < sign * self._best[0]:
            self._best = trial.values[0], trial.number
        return words + ", ".join(map(figure, trial.values)) + self._so_far()

    def _so_far(self) -> str:
        return f"  (best {figure(self._best[0])}, trial {self._best[1]})" if self._best else ""

    def _say(self, line: str) -> None:
        self._printed = time.monotonic()
        self._console.print(line, soft_wrap=True)


def _at(note: dict | None) -> str:
    if note is None:
        return "begins"
    loss = "" if note["loss"] is None else f", loss {note['loss']:.4f}"
    return f"step {note['step']}/{note['steps']}{loss}"
