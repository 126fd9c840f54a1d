"""The figures of a run on disk: losses of every step and evaluations, from which records are made."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.files import plain
from polygpt.training.loggers import Silent, truncate


class Figures(Silent):
    """The logger. All values are lists, one element per seed; a loss that is not finite is null.

    Lines: {"step": 10, "loss": [...], "skipped_in_row": [...]} and {"step": 10, "tasks": [{task: {measure: value}}]},
    with {} for a seed that has stopped.

    Args:
        path: the file.
        step: the run continues after this step; later lines from an interrupted run are removed.
        callback: called with every step and its losses.
    """

    def __init__(self, path: Path, step: int, callback: Callable[[int, tuple[float, ...]], None]):
        self._path, self._callback = path, callback
        self._open(step)

    def metrics(self, step, values):
        losses, in_row = (np.atleast_1d(values[name]).tolist() for name in ("loss", "skipped_in_row"))
        self._write({"step": step, "loss": losses, "skipped_in_row": in_row})
        self._callback(step, tuple(losses))

    def evaluation(self, step, results):
        self._write({"step": step, "tasks": [one.get("tasks", {}) for one in results.get("seeds", [results])]})

    def rewind(self, step, spike):
        self.close()
        self._open(step)

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()

    def _open(self, step: int) -> None:
        truncate(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(plain(line)) + "\n")


@dataclasses.dataclass(frozen=True)
class Course:
    """The figures of one seed.

    Attributes:
        losses: float32, one per step until it stopped, NaN where not finite.
        evaluations: (step, measures by task), in order of steps.
        stopped: whether it ended early because of too many consecutive non-finite steps.
    """

    losses: np.ndarray
    evaluations: list[tuple[int, Mapping[str, Any]]]
    stopped: bool


def read(path: Path, max_nonfinite: int) -> list[Course]:
    """The figures of all seeds, given `train.max_nonfinite`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = np.array([line["loss"] for line in lines if "loss" in line], np.float32)  # [steps, seeds]
    in_row = np.array([line["skipped_in_row"] for line in lines if "loss" in line])
    evaluations = {line["step"]: line["tasks"] for line in lines if "tasks" in line}  # one may have been repeated
    courses = []
    for i in range(losses.shape[1]):
        ends = np.flatnonzero(in_row[:, i] >= max_nonfinite)
        own = [(step, tasks[i]) for step, tasks in evaluations.items() if tasks[i]]
        courses.append(Course(losses[: ends[0] + 1 if len(ends) else None, i], own, len(ends) > 0))
    return courses
