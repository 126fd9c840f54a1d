"""Engines: where runs are computed. An engine takes tasks and returns the records of their runs.

Tasks and records travel as JSON, regardless of the transport, and all workers call `worker.work`. A task that is run
again, by any worker that sees its folder, resumes where the last worker stopped or was killed.
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
"""File in a task's folder with the last progress note."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of the runs of a task.

    Attributes:
        task: the task's name.
        seeds: the seeds in training.
        step: steps taken.
        steps: total steps.
        losses: training loss of the last step per seed; may be non-finite.
    """

    task: str
    seeds: tuple[int, ...]
    step: int
    steps: int
    losses: tuple[float, ...]


Callback = Callable[[Progress], None]
"""Callback for the progress of a task, called after every step or whenever the engine gets an update."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Missing runs of a point.

    Attributes:
        name: name of the point, unique among the tasks of an ablation.
        experiments: equal except for their seeds.
        folder: absolute path of the task's folder, from which an interrupted task resumes.
        measured: costs from `measures.MEASURES` to measure too.
    """

    name: str
    experiments: tuple[Experiment, ...]
    folder: Path
    measured: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the experiments."""
        return tuple(experiment.seed for experiment in self.experiments)

    def to_json(self) -> str:
        """Serializes the task for `from_json`."""
        first = spec.to_json(self.experiments[0])
        own = {"name": self.name, "folder": str(self.folder), "measured": self.measured}
        return json.dumps({**own, "experiment": first, "seeds": self.seeds})

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """Restores a task from `to_json`."""
        data = json.loads(text)
        first = spec.from_json(data["experiment"], data["name"])
        experiments = tuple(first.replace(seed=seed) for seed in data["seeds"])
        return cls(data["name"], experiments, Path(data["folder"]), tuple(data["measured"]))

    def progress(self) -> Progress | None:
        """The last progress note of `work`, wherever it ran; None before the first."""
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
        final: whether the input is invalid, so that another attempt would fail too.
        trace: the traceback, if any.
    """

    message: str
    final: bool
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The failure for an error."""
        final = isinstance(error, UserError)
        message = str(error) if final else f"{type(error).__name__}: {error}"
        return cls(" ".join(message.split()), final, "".join(traceback.format_exception(error)))


@dataclasses.dataclass(frozen=True)
class Engine(Spec):
    """Base class of engines. A new engine is a file in this folder with a subclass."""

    def run(self, tasks: Sequence[Task], callback: Callback) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        """Runs all tasks and yields each once as it finishes, in any order.

        Args:
            tasks: the tasks.
            callback: receives their progress.

        Yields:
            A task with the records of its runs, in the order of its experiments, or with its failure.
        """
        raise NotImplementedError
