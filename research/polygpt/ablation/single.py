"""Trains runs one after another, like `polygpt train`: for seeds that cannot be trained together.

A run resumes from its last checkpoint; its metrics are stored in its folder, one line per step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.ablation.engines.base import Callback, Progress, Task
from polygpt.ablation.record import record
from polygpt.errors import Diverged
from polygpt.files import plain, write_atomically
from polygpt.runtime import goodput
from polygpt.training.experiment import Experiment
from polygpt.training.loggers import Silent, truncate
from polygpt.training.loop import train

FIGURES, RECORD = "figures.jsonl", "record.json"
"""Files in a run's folder: metrics during training, the record at the end."""


def run(task: Task, callback: Callback) -> list[dict[str, Any]]:
    """The records of a task's runs. Raises like `run_once`."""
    return [
        run_once(experiment, task.folder / f"seed-{experiment.seed}", callback, task.name)
        for experiment in task.experiments
    ]


def run_once(
    experiment: Experiment, workdir: Path, callback: Callback = lambda _: None, name: str = ""
) -> dict[str, Any]:
    """Trains or resumes a run in its folder; returns its record.

    Metrics are those of the last step's parameters, whatever `train.use` says.

    Raises:
        UserError: data or settings are invalid, or the disk is full.
        KeyboardInterrupt: a signal asked to stop; the run is saved.
    """
    if (workdir / RECORD).exists():
        return json.loads((workdir / RECORD).read_text(encoding="utf-8"))
    steps, stopped = experiment.train.steps, False
    trained = experiment
    if experiment.evaluation.tasks and experiment.train.evaluate_every is None:
        trained = experiment.replace(train=experiment.train.replace(evaluate_every=steps))

    def loggers(folder: Path, step: int, steps: int) -> list[Silent]:
        progress = Progress(name or experiment.name, (experiment.seed,), step, steps, ())
        return [_Figures(folder / FIGURES, step, lambda step, loss: callback(_at(progress, step, loss)))]

    try:
        if not train(trained, workdir, loggers).finished:
            raise KeyboardInterrupt(f"{workdir}: saved")
    except Diverged:
        stopped = True
    losses, evaluations = _read(workdir / FIGURES)
    times = goodput.summary(goodput.read(workdir / "goodput.jsonl"))
    seconds = sum(value for category, value in times.items() if category not in ("lost", "restart"))
    made = record(trained, losses, evaluations, stopped=stopped, seconds=seconds, how="a run of its own")
    write_atomically(workdir / RECORD, json.dumps(made))
    return made


def _at(progress: Progress, step: int, loss: float) -> Progress:
    return Progress(progress.task, progress.seeds, step, progress.steps, (loss,))


class _Figures(Silent):
    """Writes every step's loss and every evaluation, one line each."""

    def __init__(self, path: Path, step: int, callback):
        self.path, self.callback = path, callback
        self._open(step)

    def _open(self, step: int) -> None:
        truncate(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")

    def step(self, step, loss):
        self._write({"step": step, "loss": loss})
        self.callback(step, loss)

    def evaluation(self, step, results):
        self._write({"step": step, "tasks": results["tasks"]})

    def rewind(self, step, spike):
        self.close()
        self._open(step)

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()

    def _write(self, line: dict) -> None:
        self.file.write(json.dumps(plain(line)) + "\n")


def _read(path: Path) -> tuple[np.ndarray, list[tuple[int, dict]]]:
    """The losses of all steps, non-finite ones as NaN, and the evaluations."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: np.nan if line["loss"] is None else line["loss"] for line in lines if "loss" in line}
    evaluations = {line["step"]: line["tasks"] for line in lines if "tasks" in line}
    return np.array([losses[step] for step in sorted(losses)], np.float32), list(evaluations.items())
