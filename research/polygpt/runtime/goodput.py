"""Where a run's time went, over all its processes and restarts: `goodput.jsonl` in the run folder.

A line is an interval: {"begin": seconds since 1970, "end": ..., "from": step, "step": step, "seconds": {...}}. It
begins where the line before it ends, so the seconds of all lines add up to the time from the first start to the end.
After a restart the first line also covers what nobody was there to write: up to the last sign of life of the process
before (the file's time of modification) it is lost, from there to the beginning of the next one the run was down, be it
for a night. A line with "finished" ends the run's time: what follows begins anew, if the run is given more steps
another day.

Goodput is the share of the time in which steps were taken that were kept; MegaScale (arXiv:2402.15627) calls it the
effective training time rate.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CATEGORIES = {
    "productive": "taking steps",
    "compile": "compiling the step",
    "input_wait": "waiting for input",
    "checkpoint": "saving",
    "evaluation": "evaluating",
    "startup": "starting up",
    "restart": "starting up again",
    "down": "not running",
    "lost": "going back",
    "other": "telling loggers",
}
"""What time is counted as, and what the loop is doing meanwhile."""
LOST = ("productive", "input_wait", "checkpoint", "evaluation", "other")
"""What was for nothing where the steps are done again."""
INTERVAL = 10.0
"""Seconds between lines. Every checkpoint ends a line too, so that a restart goes on from the end of one."""


class Goodput:
    """A clock that always runs for exactly one category, and its record.

    Args:
        path: the file; None keeps no record, as in all processes but the first.
        begun: when this process began, in seconds since 1970; now by default.

    Attributes:
        path: the file.
        activity: the category that the time goes to now.
        since: from when, on this clock.
    """

    def __init__(self, path: Path | None, begun: float | None = None):
        self.path, self._file, self._step = path, None, 0
        self._offset = time.time() - time.perf_counter()  # steady, however the system's clock is set meanwhile
        self._begin = self.since = min(begun or self.now(), self.now())
        self._alive, self._ending = 0.0, {}
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self.activity = "startup"

    def now(self) -> float:
        """Seconds since 1970."""
        return self._offset + time.perf_counter()

    def switch(self, activity: str) -> str:
        """From now on time goes to this category; returns the one before."""
        now = self.now()
        self._seconds[self.activity] += now - self.since
        before, self.activity, self.since = self.activity, activity, now
        self.touch()
        return before

    def touch(self) -> None:
        """Gives a sign of life, if the last is more than a second old."""
        if self._file and self.now() - self._alive > 1.0:
            self._alive = self.now()
            with contextlib.suppress(OSError):
                os.utime(self.path)

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Meanwhile time goes to this category."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def open(self) -> None:
        """The run folder is this process's: writes its first line, unless the run was finished and may stay so.

        Before the run is restored, so that a process that is killed meanwhile has given signs of life.
        """
        if self.path is None or self._file:
            return
        before, touched = _last(self.path)
        if before is None or not before.get("finished"):
            self._open(before, touched)
            self.record(self._step)

    def begin(self, step: int) -> None:
        """The run goes on from this step, and is no longer finished."""
        if self.path is not None and self._file is None:
            self._open(*_last(self.path))
        self._step = step
        self.record(step)

    def _open(self, before: Mapping[str, Any] | None, touched: float) -> None:
        """Opens the file, whose last line and time of modification these are, and counts the time since then."""
        self.switch("restart" if before else "startup")
        if before:  # what this call took so far was no first start
            self._seconds["restart"] += self._seconds["startup"]
            self._seconds["startup"] = 0.0
        if before and not before.get("finished"):
            end = min(before["end"], self._begin)
            alive = min(max(touched, end), self._begin)
            self._seconds["lost"] += alive - end
            self._seconds["down"] += self._begin - alive
            self._begin = end
        self._step = before["step"] if before else 0
        self._file = self.path.open("ab", buffering=0)

    def record(self, step: int, least: float = 0.0, **more: Any) -> None:
        """Writes a line up to now, unless the last was less than `least` seconds ago.

        If it cannot be written, the interval goes on: accounts are not worth a run, and a full disk is others' to tell.
        """
        self.switch(self.activity)
        if self._file is None or self.since - self._begin < least:
            return
        seconds = {name: round(value, 6) for name, value in self._seconds.items() if value}
        line = {"begin": self._begin, "end": self.since, "from": self._step, "step": step, "seconds": seconds, **more}
        if self._append(json.dumps(line).encode() + b"\n"):
            self._begin, self._step = self.since, step
            self._seconds = dict.fromkeys(CATEGORIES, 0.0)

    def back(self, step: int) -> None:
        """The run goes on from this earlier step: the time of the steps after it is lost."""
        self._step = step

    def end(self, step: int, finished: bool) -> None:
        """The run ends at this step; what is closed after it still counts."""
        self.record(step)
        self._ending = {"finished": True} if finished else {}

    def close(self) -> None:
        """Writes the last line, if there was a first."""
        if self._file is not None:
            self.record(self._step, **self._ending)
            self._file.close()
            self._file = None

    def _append(self, data: bytes) -> bool:
        """Writes all of it or nothing; whether it did."""
        size = os.fstat(self._file.fileno()).st_size
        with contextlib.suppress(OSError):
            if self._file.write(data) == len(data):
                return True
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), size)
        return False


def process_begun() -> float | None:
    """When this process was started, in seconds since 1970, where Linux tells; before Python and JAX were loaded."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None


def read(path: Path | None) -> list[dict]:
    """The lines of goodput.jsonl, but for one cut short; [] without a file."""
    return [json.loads(line) for line in _whole(path)] if path and path.is_file() else []


def summary(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by category, over all lines; {} if there are none."""
    total: dict[str, float] = {}
    open_: list[tuple[float, Mapping[str, float]]] = []  # intervals that may still turn out to be for nothing

    def add(seconds: Mapping[str, float], lost: bool) -> None:
        for name, value in seconds.items():
            name = "lost" if lost and name in LOST else name
            total[name] = total.get(name, 0.0) + value

    for line in lines:
        while open_ and open_[-1][0] > line["from"]:  # its steps are done again from here on
            add(open_.pop()[1], lost=True)
        open_.append((line["step"], line["seconds"]))
    for _, seconds in open_:
        add(seconds, lost=False)
    return {name: total.get(name, 0.0) for name in CATEGORIES} if total else {}


def table(seconds: Mapping[str, float]) -> str:
    """A summary for a person, a line a category."""
    whole = sum(seconds.values())
    lines = [f"goodput {seconds['productive'] / whole:.1%} of {duration(whole)}"]
    lines += [
        f"  {name.replace('_', ' '):<11}{duration(value):>12}{value / whole:>8.1%}"
        for name, value in seconds.items()
        if value > 0
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds for a person: 8.31 s, 12:05 (minutes), 31:12:05 (hours)."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _whole(path: Path) -> list[bytes]:
    """The lines of a file that a killed process may have left in the middle of one."""
    lines = path.read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _last(path: Path) -> tuple[dict | None, float]:
    """The last line of the file and when it was last touched, having removed what is no whole line."""
    if not path.is_file():
        return None, 0.0
    touched, whole = path.stat().st_mtime, _whole(path)
    os.truncate(path, sum(map(len, whole)))
    return (json.loads(whole[-1]) if whole else None), touched
