"""What engines whose workers are elsewhere have in common: they look now and then at what the workers have noted."""

from collections.abc import Iterable

from polygpt.ablation.engines.base import Task, Tell


class Watch:
    """Tells the progress of tasks, once for each note.

    Args:
        tell: is told.
    """

    def __init__(self, tell: Tell):
        self.tell, self.told = tell, {}

    def __call__(self, tasks: Iterable[Task]) -> None:
        """Looks at the notes of tasks that are worked on. Where their folder cannot be seen there are none."""
        for task in tasks:
            progress = task.progress()
            if progress is not None and self.told.get(task.name) != (progress.seeds, progress.step):
                self.told[task.name] = progress.seeds, progress.step
                self.tell(progress)
