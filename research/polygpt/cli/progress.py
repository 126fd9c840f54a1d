"""Progress of an evaluation or a check, on stderr."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Called with a description, examples done and the total: shows a bar on a terminal, otherwise occasional lines."""

    def __init__(self, verb: str = "evaluating", seconds: float = 10.0):
        """Args: verb: prefix of each line; seconds: between lines without a terminal."""
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(*columns, console=console, transient=True) if console.is_terminal else None
        self._verb, self._console, self._seconds, self._printed = verb, console, seconds, time.monotonic()
        self._task = None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._verb, total=None)
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar:
            self._bar.update(self._task, description=what, completed=done, total=total)
        elif time.monotonic() - self._printed >= self._seconds:
            self._printed = time.monotonic()
            self._console.print(f"{self._verb} {what} {done}/{total}", soft_wrap=True)
