"""Reads the folder of a finished run, for `compare`."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polygpt import sources, spec
from polygpt.ablation.measures import TRAINING_LOSS
from polygpt.ablation.record import finite_mean
from polygpt.errors import UserError
from polygpt.overrides import override
from polygpt.report.finish import RESULTS
from polygpt.training.experiment import Experiment
from polygpt.training.held_out import MetricState
from polygpt.training.workdir import drop_equivalent_settings, load_experiment


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        folder: the run folder.
        experiment: its experiment.
        config: the experiment as JSON, without the seed and whatever does not change results.
        step: its last step.
        metrics: by name, "task/measure" and "train/loss".
    """

    folder: Path
    experiment: Experiment
    config: dict[str, Any]
    step: int
    metrics: dict[str, float]

    @property
    def seed(self) -> int:
        """Seed of the experiment."""
        return self.experiment.seed


def finished_run(folder: Path) -> FinishedRun:
    """Reads a run folder. Raises UserError if it is not a run folder, or its run is not finished."""
    experiment = load_experiment(folder)
    losses, evaluations, chosen = {}, {}, {}
    for line in _lines(folder / "metrics.jsonl"):
        if "loss" in line:
            losses[line["step"]] = math.nan if line["loss"] is None else line["loss"]
        if "evaluation" in line:
            evaluations[line["step"]] = line["evaluation"]
            chosen[line["step"]] = line.get("metric")
    last = max([*losses, *evaluations], default=0)
    # Metrics are written every `log_every` steps, so the last line may precede the end.
    unfinished = last <= experiment.train.steps - experiment.train.log_every
    if unfinished and not _out_of_patience(experiment, chosen) or not losses:
        steps = f"{experiment.train.steps:,}"
        raise UserError(f"{folder} is at step {last:,} of {steps}: finish it first, or train it again")
    tasks = evaluations.get(last, {})
    if (path := folder / RESULTS).is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        tasks = {**tasks, **results["tasks"]}
        experiment = override(experiment, results.get("overrides", {}))  # so that differing evaluations show up
    metrics = {f"{task}/{name}": value for task, measures in tasks.items() for name, value in measures.items()}
    tail = [loss for step, loss in losses.items() if step > 0.9 * last] or [losses[max(losses)]]
    metrics[TRAINING_LOSS] = finite_mean(np.array(tail, float))
    return FinishedRun(folder, experiment, _config(experiment), last, metrics)


def _out_of_patience(experiment: Experiment, chosen: Mapping[int, float | None]) -> bool:
    """Whether a run with these metrics, by step of evaluation, has ended by `train.patience`."""
    state = MetricState()
    for step in sorted(chosen):
        state.update(math.nan if chosen[step] is None else chosen[step], experiment.train.better)
    return experiment.train.patience is not None and state.stale >= experiment.train.patience


def _config(experiment) -> dict[str, Any]:
    """The experiment as JSON, plus the code of user classes by file name."""
    data = json.loads(json.dumps(spec.to_json(experiment.replace(seed=0, name="any"))))
    drop_equivalent_settings(data)
    files = {file for cls in sources.user_classes(experiment) if (file := sources.file_of(cls))}
    code = {file.stem.replace(".", "_"): sources.code_hash(file)[:8] for file in sorted(files)}
    return data | ({"code": code} if code else {})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: train it first")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number} is not JSON: a run may be writing it, try again later") from None
