"""Accounts for a run's wall-clock time over all processes and restarts: `goodput.jsonl` in the run folder.

Each line is an interval: {"begin": seconds since the epoch, "end": ..., "from": step, "step": step, "seconds": {...}}.
It begins where the previous line ends, so the seconds of all lines add up to the time from the first start to the end.
After a restart, the first line also covers the gap: up to the previous process's last sign of life (the file's
modification time) the time is "lost", from then until the restart it is "down". A line with "finished" ends the
accounting; if the run is later given more steps, it starts again from there.

Goodput is the share of time spent on steps that were kept; MegaScale (arXiv:2402.15627) calls it the effective training
time rate.
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
    "other": "logging",
}
"""Categories of time, and what the loop is doing."""
LOST = ("productive", "input_wait", "checkpoint", "evaluation", "other")
"""Categories that count as lost if their steps are repeated."""
INTERVAL = 10.0
"""Seconds between lines. Checkpoints end a line too, so that restarts resume at a line boundary."""


class Goodput:
    """A clock that always runs for exactly one category, and its log.

    Args:
        path: the file; None writes nothing, as in all processes but process 0.
        begun: start of this process in seconds since the epoch; default: now.

    Attributes:
        path: the file.
        activity: the current category.
        since: when it started, on this clock.
    """

    def __init__(self, path: Path | None, begun: float | None = None):
        self.path, self._file, self._step = path, None, 0
        self._offset = time.time() - time.perf_counter()  # monotonic, even if the system clock is adjusted
        self._begin = self.since = min(begun or self.now(), self.now())
        self._alive, self._ending = 0.0, {}
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self.activity = "startup"

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._offset + time.perf_counter()

    def switch(self, activity: str) -> str:
        """Switches to a category; returns the previous one."""
        now = self.now()
        self._seconds[self.activity] += now - self.since
        before, self.activity, self.since = self.activity, activity, now
        self.touch()
        return before

    def touch(self) -> None:
        """Updates the file's modification time as a sign of life, at most once per second."""
        if self._file and self.now() - self._alive > 1.0:
            self._alive = self.now()
            with contextlib.suppress(OSError):
                os.utime(self.path)

    @contextlib.contextmanager
    def track(self, activity: str) -> Iterator[None]:
        """Context manager: counts the time inside for this category."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def open(self) -> None:
        """Called once this process owns the run folder: writes the first line, unless the run has finished.

        Call it before restoring, so that a process killed during the restore has left signs of life.
        """
        if self.path is None or self._file:
            return
        before, touched = _last(self.path)
        if before is None or not before.get("finished"):
            self._open(before, touched)
            self.record(self._step)

    def begin(self, step: int) -> None:
        """The run resumes at this step and is no longer finished."""
        if self.path is not None and self._file is None:
            self._open(*_last(self.path))
        self._step = step
        self.record(step)

    def _open(self, before: Mapping[str, Any] | None, touched: float) -> None:
        """Opens the file and accounts for the time since its last line and modification time."""
        self.switch("restart" if before else "startup")
        if before:  # the startup so far was a restart
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
        """Writes a line up to now, unless the last one is less than `least` seconds old.

        If writing fails, the interval stays open: accounting must not end a run, and others report a full disk.
        """
        self.switch(self.activity)
        if self._file is None or self.since - self._begin < least:
            return
        seconds = {name: round(value, 6) for name, value in self._seconds.items() if value}
        line = {"begin": self._begin, "end": self.since, "from": self._step, "step": step, "seconds": seconds, **more}
        if self._append(json.dumps(line).encode() + b"\n"):
            self._begin, self._step = self.since, step
            self._seconds = dict.fromkeys(CATEGORIES, 0.0)

    def rewind(self, step: int) -> None:
        """The run rewinds to this earlier step: the time of later steps is lost."""
        self._step = step

    def end(self, step: int, finished: bool) -> None:
        """The run ends at this step; the time until `close` still counts."""
        self.record(step)
        self._ending = {"finished": True} if finished else {}

    def close(self) -> None:
        """Writes the last line, if there was a first one."""
        if self._file is not None:
            self.record(self._step, **self._ending)
            self._file.close()
            self._file = None

    def _append(self, data: bytes) -> bool:
        """Writes all of it or nothing; returns whether it succeeded."""
        size = os.fstat(self._file.fileno()).st_size
        with contextlib.suppress(OSError):
            if self._file.write(data) == len(data):
                return True
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), size)
        return False


def process_begun() -> float | None:
    """Start time of this process in seconds since the epoch, before Python was loaded; None outside Linux."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None


def read(path: Path | None) -> list[dict]:
    """The lines of goodput.jsonl, without a truncated one; [] without a file."""
    return [json.loads(line) for line in _whole(path)] if path and path.is_file() else []


def summary(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds per category over all lines; {} if there are none."""
    total: dict[str, float] = {}
    open_: list[tuple[float, Mapping[str, float]]] = []  # intervals whose steps may still be repeated

    def add(seconds: Mapping[str, float], lost: bool) -> None:
        for name, value in seconds.items():
            name = "lost" if lost and name in LOST else name
            total[name] = total.get(name, 0.0) + value

    for line in lines:
        while open_ and open_[-1][0] > line["from"]:  # its steps are repeated from here on
            add(open_.pop()[1], lost=True)
        open_.append((line["step"], line["seconds"]))
    for _, seconds in open_:
        add(seconds, lost=False)
    return {name: total.get(name, 0.0) for name in CATEGORIES} if total else {}


def table(seconds: Mapping[str, float]) -> str:
    """A readable summary, one line per category."""
    whole = sum(seconds.values())
    lines = [f"goodput {seconds['productive'] / whole:.1%} of {duration(whole)}"]
    lines += [
        f"  {name.replace('_', ' '):<11}{duration(value):>12}{value / whole:>8.1%}"
        for name, value in seconds.items()
        if value > 0
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Formats seconds: 8.31 s, 12:05 (minutes), 31:12:05 (hours)."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _whole(path: Path) -> list[bytes]:
    """The complete lines of a file; a killed process may have left a partial one."""
    lines = path.read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _last(path: Path) -> tuple[dict | None, float]:
    """Removes a partial line; returns the last line and the modification time."""
    if not path.is_file():
        return None, 0.0
    touched, whole = path.stat().st_mtime, _whole(path)
    os.truncate(path, sum(map(len, whole)))
    return (json.loads(whole[-1]) if whole else None), touched
