"""For engines whose workers run elsewhere: reads the progress notes of workers."""

from collections.abc import Iterable

from polygpt.ablation.engines.base import Task, Tell


class Watch:
    """Reports the progress of tasks, once per note.

    Args:
        tell: receives it.
    """

    def __init__(self, tell: Tell):
        self.tell, self.told = tell, {}

    def __call__(self, tasks: Iterable[Task]) -> None:
        """Reads the notes of running tasks. A folder on another machine has none."""
        for task in tasks:
            progress = task.progress()
            if progress is not None and self.told.get(task.name) != (progress.seeds, progress.step):
                self.told[task.name] = progress.seeds, progress.step
                self.tell(progress)
