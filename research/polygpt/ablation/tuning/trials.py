"""Runs trials one after another. A trial's run can be stopped or killed, and resumed.

python -m polygpt.ablation.tuning.trials FOLDER     runs trials of the search in a folder until there are enough
"""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from polygpt.ablation.budget import costs
from polygpt.ablation.engines import worker
from polygpt.ablation.measures import TRAINING_LOSS
from polygpt.ablation.record import finite_mean
from polygpt.ablation.tune import Search
from polygpt.ablation.tuning.storage import Storage, read_search
from polygpt.errors import Diverged, SpecError, UserError
from polygpt.files import write_atomically
from polygpt.report.gather import read_json, read_lines
from polygpt.runtime.storage import storage_fault
from polygpt.scale.plan.memory import exhausted
from polygpt.training.experiment import Experiment
from polygpt.training.loggers import JsonLines, Silent
from polygpt.training.loop import train

EVERY = 1.0
"""Seconds between progress notes of a trial."""
PROGRESS = "progress.json"
"""File in a trial's folder: {"step", "steps", "loss"}."""


def work(storage: Storage, callback: Callable[[], None] = lambda: None) -> None:
    """Runs trials until there are enough, or other processes are running the last ones.

    Args:
        storage: the search.
        callback: called at intervals, when the status may have changed.

    Raises:
        UserError: data or settings are invalid.
        Exception: the machine failed; the trial is resumed next time.
        KeyboardInterrupt: a signal asked to stop; the trial is saved and resumed next time.
    """
    while True:
        with storage.next() as found:
            if found is None:
                return
            _Trial(storage, *found, callback).run()
        callback()


def progress(folder: Path) -> dict[str, Any] | None:
    """The last progress note of a running trial: "step", "steps" and "loss"; None before the first."""
    return read_json(folder / PROGRESS)


class _Pruned(Exception):
    """Ends a trial early because of its values; the sampler learns from it."""


class _Trial:
    def __init__(self, storage: Storage, trial: Any, folder: Path, callback: Callable[[], None]):
        self.storage, self.search, self.trial = storage, storage.search, trial
        self.folder, self.workdir, self.callback = folder, folder / "run", callback

    def run(self) -> None:
        """Trains, and records the outcome in the storage.

        A failure of the machine (full disk, lost device, unreadable data) says nothing about the values: it ends the
        search, and the trial is resumed next time. After any other error the trial is retried once. If the error recurs
        and other trials have completed, it counts against the values.
        """
        try:
            values = self._values()
        except _Pruned as pruned:
            self.storage.prune(self.trial, str(pruned))
        except KeyboardInterrupt:
            self.storage.leave(self.trial, "interrupted")
            raise
        except Exception as error:
            reason = " ".join(f"failed: {type(error).__name__}: {error}".split())
            if _of_the_machine(error, self.workdir):
                self.storage.leave(self.trial, reason)
                raise
            if not self.storage.complete_ones():  # no trial has completed: the settings may be invalid
                self.storage.fail(self.trial, reason)
                raise
            if self.trial.user_attrs.get("after") != reason:
                self.storage.leave(self.trial, reason)
                return
            self.storage.prune(self.trial, f"{reason} (twice)")
        else:
            self.storage.complete(self.trial, values)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _values(self) -> list[float]:
        """The metric, and the second objective if any."""
        try:
            experiment = self.search.experiment(self.trial.params)
            each = costs(experiment)
        except SpecError as error:
            raise _Pruned(f"does not fit: {error}") from error
        attributes = {"parameters": each.parameters, "flops": each.flops * experiment.train.steps}
        for name, value in {**attributes, "steps": experiment.train.steps}.items():
            self.trial.set_user_attr(name, value)
        self._train(experiment)
        value = _measured(self.search, self.workdir)
        if not math.isfinite(value):
            raise _Pruned(f"diverged: {self.search.metric} is not finite")
        return [value] + ([attributes[self.search.against]] if self.search.against else [])

    def _train(self, experiment: Experiment) -> None:
        def loggers(workdir: Path, step: int, steps: int) -> list[Silent]:
            return [JsonLines(workdir, step), _Watched(self, workdir, steps)]

        try:
            with _printed_to(self.folder / worker.LOG):
                outcome = train(experiment, self.workdir, loggers)
        except Diverged as error:
            raise _Pruned(f"diverged: {error}") from error
        except SpecError as error:
            raise _Pruned(f"does not fit: {error}") from error
        except MemoryError as error:
            raise _Pruned("out of memory") from error
        except jax.errors.JaxRuntimeError as error:
            if exhausted(error) is None:
                raise
            raise _Pruned("out of memory") from error
        if not outcome.finished:
            raise KeyboardInterrupt(f"{self.folder}: saved")

    def report(self, value: float, step: int, steps: int) -> None:
        """Reports the intermediate metric at a percentage of the run. Raises _Pruned to end the run."""
        at = round(100 * step / steps)
        if not math.isfinite(value):
            raise _Pruned(f"diverged: {self.search.metric} is not finite at step {step:,}")
        if self.search.against:  # Optuna cannot prune with two objectives
            return
        self.trial.report(value, at)
        if step < steps and self.trial.should_prune():
            raise _Pruned(f"worse than others at {at} %: {self.search.metric} {value:.5g}")


def _of_the_machine(error: Exception, workdir: Path) -> bool:
    """Whether the machine caused an error: the same values may work elsewhere, or later."""
    if isinstance(error, (OSError, jax.errors.JaxRuntimeError)):
        return True
    cause = error.__cause__
    return isinstance(error, UserError) and isinstance(cause, Exception) and bool(storage_fault(cause, workdir))


class _Watched(Silent):
    """Writes progress notes and reports intermediate metrics."""

    def __init__(self, trial: _Trial, workdir: Path, steps: int):
        self.trial, self.steps, self.last = trial, steps, -EVERY
        self.losses: list[float] = []
        self.every = max(1, steps // 10)
        lines = read_lines(workdir / "metrics.jsonl")  # from a previous process of this trial
        for line in lines if trial.search.metric != TRAINING_LOSS else ():
            if "evaluation" in line:
                self._report(line["step"], line["evaluation"])

    def step(self, step, loss):
        if time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            note = {"step": step, "steps": self.steps, "loss": loss if math.isfinite(loss) else None}
            write_atomically(self.trial.folder / PROGRESS, json.dumps(note))
            self.trial.callback()
        if self.trial.search.metric == TRAINING_LOSS:
            self.losses.append(loss)
            if step % self.every == 0:
                self.trial.report(finite_mean(np.array(self.losses[-self.every :])), step, self.steps)

    def evaluation(self, step, results):
        if self.trial.search.metric != TRAINING_LOSS:
            self._report(step, results["tasks"])

    def _report(self, step: int, tasks: dict) -> None:
        value = _figure(tasks, self.trial.search.metric)
        self.trial.report(math.nan if value is None else value, step, self.steps)


def _measured(search: Search, workdir: Path) -> float:
    """The metric of a finished run."""
    lines = read_lines(workdir / "metrics.jsonl")
    if search.metric == TRAINING_LOSS:
        losses = np.array([np.nan if line["loss"] is None else line["loss"] for line in lines if "loss" in line])
        return finite_mean(losses[-max(1, len(losses) // 10) :])
    value = _figure([line["evaluation"] for line in lines if "evaluation" in line][-1], search.metric)
    return math.nan if value is None else value


def _figure(tasks: dict, metric: str) -> float | None:
    task, _, measure = metric.rpartition("/")
    if measure not in tasks[task]:
        there = ", ".join(f"{task}/{name}" for name in tasks[task])
        raise UserError(f"the metric {metric!r} was not measured; there are {there}")
    return tasks[task][measure]


@contextlib.contextmanager
def _printed_to(log: Path) -> Iterator[None]:
    """Context manager: redirects output to a file, because runs' lines would hide those of the search."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        yield


def main(argv: list[str]) -> int:
    """Runs trials of the search in a folder; returns 2 for invalid input, reported on stderr, and 130 after a
    signal."""
    worker.end_with_parent()
    try:
        folder = Path(argv[0])
        work(Storage(read_search(folder), folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
