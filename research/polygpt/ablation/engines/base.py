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
"""Seconds between a worker's progress notes."""
PROGRESS = "progress.json"
"""In a task's folder: the last note."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the runs of a task are.

    Attributes:
        task: the task's name.
        seeds: the seeds in training.
        step: steps taken.
        steps: steps in all.
        losses: training loss of the last step per seed; may be non-finite.
    """

    task: str
    seeds: tuple[int, ...]
    step: int
    steps: int
    losses: tuple[float, ...]


Tell = Callable[[Progress], None]
"""Receives the progress of a task, after every step or as often as the engine learns of it."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Runs of a point that are to be made.

    Attributes:
        name: name of the point, unique among the tasks of an ablation.
        experiments: equal except for their seeds.
        folder: absolute path of the task's own folder, from which an interrupted task resumes.
        measured: costs of `measures.MEASURES` to measure as well.
    """

    name: str
    experiments: tuple[Experiment, ...]
    folder: Path
    measured: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The experiments' seeds."""
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
        """The last note of `work`, wherever it ran; None before the first."""
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
        final: whether the input is at fault, so that another attempt would fail too.
        trace: the traceback, if there is one.
    """

    message: str
    final: bool
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The failure that an error means."""
        final = isinstance(error, UserError)
        message = str(error) if final else f"{type(error).__name__}: {error}"
        return cls(" ".join(message.split()), final, "".join(traceback.format_exception(error)))


@dataclasses.dataclass(frozen=True)
class Engine(Spec):
    """Base class of engines. A new engine is a file in this folder with a subclass."""

    def run(self, tasks: Sequence[Task], tell: Tell) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        """Works on all tasks and yields each once, as it finishes, in any order.

        Args:
            tasks: the tasks.
            tell: receives their progress.

        Yields:
            A task with the records of its runs, in the order of its experiments, or with its failure.
        """
        raise NotImplementedError
