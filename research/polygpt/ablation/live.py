"""Progress of an ablation: a live table on a terminal, otherwise occasional lines."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from polygpt.ablation.engines.base import Progress
from polygpt.ablation.intervals import interval_t
from polygpt.ablation.measures import figures
from polygpt.ablation.runner import Failed, Finished, Planned
from polygpt.ablation.study import Ablation, Point, places
from polygpt.ablation.variants import Name
from polygpt.markup import duration, value_text, with_interval

BEGINNING = 0.1
"""Fraction of steps that the first run of a stage must complete before the remaining time is estimated."""
MOST = 30
"""Maximum number of table rows; with more points, only running and recently finished ones are shown."""


class Live:
    """A callback for events (`runner.Callback`) and a context manager.

    Args:
        ablation: the ablation being run.
        seeds: number of seeds per point.
        records: existing lines of runs of the comparison.
        console: output; default: stderr.
        seconds: interval between lines without a terminal.
    """

    def __init__(
        self,
        ablation: Ablation,
        seeds: int,
        records: Iterable[Mapping[str, Any]] = (),
        console: Console | None = None,
        seconds: float = 10.0,
    ):
        self.ablation, self.seeds = ablation, seeds
        self.names = {
            Point(variant, at, ablation.base, tuned).name: _row(variant, at)
            for variant, at in places(ablation)
            for tuned in (None, *ablation.tuned)
        }
        self.found: dict[str, dict[int, float | None]] = {_row(v, at): {} for v, at in places(ablation)}
        self.steps: dict[str, Progress] = {}
        self.stage, self.runs, self.done, self.made = "", 0, 0, 0
        self._take(records)
        self.console = console or Console(stderr=True, highlight=False)
        plainly = {"console": self.console, "transient": True, "refresh_per_second": 4}
        self._screen = Screen(get_renderable=self.table, **plainly) if self.console.is_terminal else None
        self._seconds, self._printed, self._begun = seconds, time.monotonic(), time.monotonic()

    def __enter__(self) -> "Live":
        if self._screen:
            self._screen.start()
        return self

    def __exit__(self, *_) -> None:
        if self._screen:
            self._screen.stop()

    def __call__(self, event: Planned | Progress | Finished | Failed) -> None:
        """Records an event and updates the display when due."""
        if isinstance(event, Planned):
            self.stage, self.runs, self.done = event.stage, event.runs, event.done
            self.steps, self.made, self._begun = {}, 0, time.monotonic()
            if event.tasks:
                self._say(f"{event.stage}: {event.runs} runs, {event.done} already done")
        elif isinstance(event, Progress):
            self.steps[event.task] = event
            if time.monotonic() - self._printed >= self._seconds:
                self._say(self._line(event))
        elif isinstance(event, Finished):
            keys = len({record["key"] for record in event.records})
            self.done, self.made = self.done + keys, self.made + keys
            self._take([record for record in event.records if record["stage"] == "comparison"])
            finished = {_row(record["variant"], record["at"]) for record in event.records}
            self.steps = {name: one for name, one in self.steps.items() if self.names.get(name) not in finished}
            self._say(f"{self.done}/{self.runs} runs done, {', '.join(sorted(finished))}{self._left(', {} left')}")
        else:
            self.steps.pop(event.task.name, None)
            self.console.print(Text(f"{event.task.name} failed: {event.failure.message}"), soft_wrap=True)

    def left(self) -> float | None:
        """Estimated seconds until the stage is done, from its finished and running runs.

        None at the start of the first runs, when most of the time was spent on starting and compiling.
        """
        begun = sum(len(one.seeds) * one.step / one.steps for one in self.steps.values())
        furthest = max((one.step / one.steps for one in self.steps.values()), default=0.0)
        if self.runs <= self.done or not self.made and furthest < BEGINNING:
            return None
        then = sum(max(0, self.seeds - len(one)) for one in self.found.values()) if self.stage == "tuning" else 0
        return (time.monotonic() - self._begun) / (self.made + begun) * (max(0.0, self.runs - self.done - begun) + then)

    def table(self) -> Group:
        """The current table."""
        shown = Table(box=None, pad_edge=False)
        for i, head in enumerate(("variant", "seeds", f"{self.ablation.metric}, 95 % interval", "now")):
            shown.add_column(head, justify="right" if i else "left", no_wrap=True)
        now = {row: one for name, one in self.steps.items() if (row := self.names.get(name)) is not None}
        kept = sorted(self.found, key=lambda row: row not in now)[:MOST]
        for row in [row for row in self.found if row in kept]:
            figures = self.found[row]
            shown.add_row(Text(row), f"{len(figures)}/{self.seeds}", _mean(figures.values()), _step(now.get(row)))
        parts = [f"{self.stage}: {self.done}/{self.runs} runs", self._left("about {} left")]
        more = [f"and {len(self.found) - MOST} more points"] if len(self.found) > MOST else []
        return Group(shown, Text(", ".join(filter(None, [*more, *parts])), style="dim"))

    def _take(self, records: Iterable[Mapping[str, Any]]) -> None:
        metric = self.ablation.metric
        for record in records:
            value = self.ablation.diverged if record["diverged"] else figures(record).get(metric)
            self.found.setdefault(_row(record["variant"], record["at"]), {})[record["seed"]] = value

    def _line(self, event: Progress) -> str:
        losses = np.array(event.losses, float)
        known = losses[np.isfinite(losses)]
        loss = f", loss {known.mean():.4g}" if len(known) else ""
        return f"{event.task}: {_step(event)}{loss}; {self.done}/{self.runs} runs done{self._left(', {} left')}"

    def _left(self, text: str) -> str:
        left = self.left()
        return "" if left is None else text.format(duration(left))

    def _say(self, line: str) -> None:
        """Prints a line, unless the table shows it."""
        if not self._screen:
            self._printed = time.monotonic()
            self.console.print(Text(line), soft_wrap=True)


def _row(variant: str, at: Mapping[str, Name]) -> str:
    return ", ".join([variant, *(f"{factor} {value_text(value)}" for factor, value in at.items())])


def _step(event: Progress | None) -> str:
    if event is None:
        return ""
    seeds = f"seed{'s' * (len(event.seeds) > 1)} {_ranges(event.seeds)}"
    return f"{seeds}, step {event.step:,}/{event.steps:,}"


def _ranges(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if whole else ", ".join(map(str, seeds))


def _mean(values: Iterable[float | None]) -> str:
    known = np.array([value for value in values if value is not None], float)
    return with_interval(float(known.mean()), interval_t(known)) if len(known) else ""
