"""Trains the seeds of a point by the loop of `polygpt train`: all in one program, or else one after the other.

A run or group of seeds resumes from its last checkpoint; killed and restarted, it gives bit-identical results.
"""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from polygpt.ablation import figures
from polygpt.ablation.engines.base import Callback, Progress, Task
from polygpt.ablation.figures import Figures
from polygpt.ablation.memory import fitting, most
from polygpt.ablation.record import record
from polygpt.errors import Diverged, Unreadable
from polygpt.files import write_atomically
from polygpt.runtime import goodput
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.storage import storage_faults
from polygpt.scale.plan.memory import exhausted
from polygpt.spec import counted
from polygpt.training import seeds
from polygpt.training.experiment import Experiment
from polygpt.training.loop import train

EVERY_MINUTES = 1 / 3
"""Minutes between the checkpoints of a group."""
FIGURES, RECORDS = "figures.jsonl", "records.json"
"""Files in a run folder: figures during training, records at the end."""

log = logging.getLogger(__name__)


def reason_against(experiment: Experiment) -> str | None:
    """Why the seeds of an experiment cannot be trained together; None if they can."""
    if (reason := seeds.reason_against(experiment.train)) is not None:
        return reason
    if experiment.train.parallel == "auto" and jax.device_count() > 1 and fitting(experiment) < 1:
        return "train.parallel is 'auto', and one seed needs more than one device's memory"
    return None


def run(task: Task, callback: Callback) -> list[dict[str, Any]]:
    """The records of a task's runs. If all seeds do not fit into memory together, trains them in smaller groups.

    Raises:
        UserError: data or settings are invalid, or the disk is full.
        KeyboardInterrupt: a signal asked to stop; everything is saved.
    """
    with storage_faults(task.folder):
        if reason_against(task.experiments[0]) is None:
            return _in_groups(task, task.experiments, most(task.experiments[0]), callback)
        return [alone(one, task.folder / f"alone-{one.seed}", callback, task.name) for one in task.experiments]


def alone(experiment: Experiment, workdir: Path, callback: Callback = lambda _: None, name: str = "") -> dict[str, Any]:
    """Trains or resumes a single run in its folder; returns its record. Raises like `run`."""
    return _records([experiment], workdir, callback, name, together=False)[0]


def _in_groups(task: Task, experiments: Sequence[Experiment], most: int, callback: Callback) -> list[dict[str, Any]]:
    records = []
    for part in np.array_split(np.arange(len(experiments)), math.ceil(len(experiments) / most)):
        some = [experiments[i] for i in part]
        found = _together(task, some, callback)
        if found is None:  # not in the handler of the error, which refers to the state that did not fit
            log.warning("%s: %d seeds do not fit into memory together: trying half as many", task.name, len(some))
            found = _in_groups(task, some, math.ceil(len(some) / 2), callback)
        records += found
    return records


def _together(task: Task, experiments: Sequence[Experiment], callback: Callback) -> list[dict[str, Any]] | None:
    """The records of a group of seeds; None if they do not fit into memory."""
    ends = dict.fromkeys(str(experiments[i].seed) for i in (0, -1))
    try:
        return _records(experiments, task.folder / "-".join(["seeds", *ends]), callback, task.name, together=True)
    except jax.errors.JaxRuntimeError as error:
        if exhausted(error) is None or len(experiments) == 1:
            raise
        return None


def _records(
    experiments: Sequence[Experiment], workdir: Path, callback: Callback, name: str, together: bool
) -> list[dict[str, Any]]:
    """Trains or resumes one run, or several seeds together, in a folder; returns the record of each seed.

    Metrics are those of the last step's parameters, whatever `train.use` says.
    """
    if (workdir / RECORDS).exists():
        return json.loads((workdir / RECORDS).read_text(encoding="utf-8"))
    trained, own, diverged = _settings(experiments[0], together), tuple(one.seed for one in experiments), False

    def loggers(folder: Path, step: int, steps: int) -> list[Figures]:
        if step:
            log.warning("%s: resuming at step %d", name, step)
        return [Figures(folder / FIGURES, step, lambda *at: callback(Progress(name, own, at[0], steps, at[1])))]

    try:
        if not train(trained, workdir, loggers, seeds=own if together else (), on_message=log.info).finished:
            raise KeyboardInterrupt(f"{workdir}: saved")
    except Diverged:
        diverged = True
    except Unreadable as error:
        log.warning("%s: restarting training: %s", name, error)
        shutil.rmtree(workdir / "checkpoints")
        return _records(experiments, workdir, callback, name, together)
    times = goodput.summary(goodput.read(workdir / "goodput.jsonl"))
    seconds = sum(value for category, value in times.items() if category not in ("lost", "restart", "down")) / len(own)
    how = f"{counted(len(own), 'seed')} in one program" if together else "a run of its own"
    made = [
        record(one, course.losses, course.evaluations, stopped=diverged or course.stopped, seconds=seconds, how=how)
        for one, course in zip(experiments, figures.read(workdir / FIGURES, trained.train.max_nonfinite), strict=True)
    ]
    write_atomically(workdir / RECORDS, json.dumps(made))
    return made


def _settings(experiment: Experiment, together: bool) -> Experiment:
    """What is trained: every step is logged and the last one evaluated, without an effect on the training."""
    train = experiment.train.replace(log_every=1)
    if experiment.evaluation.tasks and train.evaluate_every is None:
        train = train.replace(evaluate_every=train.steps)
    if together:  # only by time: it never rewinds to a certain step, and its steps may be very short
        train = train.replace(checkpoint=CheckpointSpec(every=train.steps, every_minutes=EVERY_MINUTES))
    return experiment.replace(train=train)
