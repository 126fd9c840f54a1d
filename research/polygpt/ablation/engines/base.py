"""Engines: where runs are computed. An engine takes tasks and gives back the records of their runs.

Workers take text and give text: a task travels as JSON, whatever carries it, and `worker.work` is the one function that
all workers call. A task that is worked on again, by any worker that sees its folder, resumes where the last one
stopped or was killed.
"""

import dataclasses
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from polygpt import spec
from polygpt.errors import UserError
from polygpt.spec import Spec
from polygpt.training.experiment import Experiment

EVERY = 1.0
"""Seconds between two notes of a worker's progress."""
PROGRESS = "progress.json"
"""In a task's folder: the last note."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the runs of a task are.

    Attributes:
        task: the task's name.
        seeds: those that are trained now.
        step: steps taken.
        steps: of how many.
        losses: of each seed, the training loss of the last step; it may not be finite.
    """

    task: str
    seeds: tuple[int, ...]
    step: int
    steps: int
    losses: tuple[float, ...]


Tell = Callable[[Progress], None]
"""Is told how far a task is: after every step, or as often as the engine comes to know."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The runs of a point that are to be done.

    Attributes:
        name: of the point, for people; no two tasks of an ablation have the same.
        experiments: equal but for their seeds.
        folder: absolute, the task's own: it holds what an interrupted task goes on from.
        measured: costs to be measured besides, of `measures.MEASURES`.
    """

    name: str
    experiments: tuple[Experiment, ...]
    folder: Path
    measured: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each experiment."""
        return tuple(experiment.seed for experiment in self.experiments)

    def to_json(self) -> str:
        """As text, for `from_json`."""
        first = spec.to_json(self.experiments[0])
        own = {"name": self.name, "folder": str(self.folder), "measured": self.measured}
        return json.dumps({**own, "experiment": first, "seeds": self.seeds})

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The task that `to_json` wrote."""
        data = json.loads(text)
        first = spec.from_json(data["experiment"], data["name"])
        experiments = tuple(first.replace(seed=seed) for seed in data["seeds"])
        return cls(data["name"], experiments, Path(data["folder"]), tuple(data["measured"]))

    def progress(self) -> Progress | None:
        """The last note that `work` left, wherever it ran; None before the first."""
        try:
            data = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return Progress(self.name, tuple(data["seeds"]), data["step"], data["steps"], tuple(data["losses"]))


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a task has no records.

    Attributes:
        message: one line.
        final: whether the input is at fault, so that to try again would not help.
        trace: the traceback, where there is one.
    """

    message: str
    final: bool
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Of an error that ended a task."""
        final = isinstance(error, UserError)
        message = str(error) if final else f"{type(error).__name__}: {error}"
        return cls(" ".join(message.split()), final, "".join(traceback.format_exception(error)))


@dataclasses.dataclass(frozen=True)
class Engine(Spec):
    """Base of the engines. A new one is a file of this folder with a subclass."""

    def run(self, tasks: Sequence[Task], tell: Tell) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        """Works on all tasks; gives each once, when it is done, in whatever order.

        Args:
            tasks: what is to be done.
            tell: is told how far the tasks are.

        Yields:
            A task, and the records of its runs in the order of its experiments, or why there are none.
        """
        raise NotImplementedError
