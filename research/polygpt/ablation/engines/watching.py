"""Reads workers' progress notes, for engines whose workers run elsewhere."""

from collections.abc import Iterable

from polygpt.ablation.engines.base import Callback, Task


class Watch:
    """Reports the progress of tasks, once per note.

    Args:
        callback: receives the progress.
    """

    def __init__(self, callback: Callback):
        self.callback, self.told = callback, {}

    def __call__(self, tasks: Iterable[Task]) -> None:
        """Reads the notes of running tasks; folders on other machines have none."""
        for task in tasks:
            progress = task.progress()
            if progress is not None and self.told.get(task.name) != (progress.seeds, progress.step):
                self.told[task.name] = progress.seeds, progress.step
                self.callback(progress)
