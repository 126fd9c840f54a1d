"""The run's metric on held-out data, and how it stands."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from polygpt.errors import UserError
from polygpt.evaluation.evaluate import evaluate
from polygpt.evaluation.spec import EvaluationSpec
from polygpt.runtime import processes
from polygpt.training.experiment import Experiment
from polygpt.training.program import Program
from polygpt.training.state import State


@dataclasses.dataclass
class Standing:
    """The best metric so far, how many evaluations ago it was, and whether this step's evaluation is still owed."""

    best: float | None = None
    stale: int = 0
    owed: bool = False

    def update(self, metric: float, better: str) -> bool:
        """Takes a new metric; True if it is the best."""
        self.owed = False
        sign = 1 if better == "lower" else -1
        improved = math.isfinite(metric) and (self.best is None or sign * metric < sign * self.best)
        self.best, self.stale = (metric, 0) if improved else (self.best, self.stale + 1)
        return improved


def plan(experiment: Experiment) -> EvaluationSpec:
    """What is evaluated in the course of training: losses alone, unless `train.evaluate` says more."""
    held_out = experiment.evaluation
    if experiment.train.evaluate == "full":
        return held_out
    tasks = {name: task.replace(generate=False) for name, task in held_out.tasks.items()}
    return held_out.replace(modality_gain=False, tasks=tasks)


def measure(
    program: Program, state: State, tokenizer, proceed: Callable[[], None] = lambda: None
) -> tuple[float, dict[str, Any]]:
    """The run's metric, the same in all processes, and what `evaluate` gives with the averaged parameters.

    `proceed` is called before each batch; what it raises ends the evaluation.

    Raises:
        UserError: a held-out record cannot be used, or `train.metric` was not measured.
    """
    experiment = program.experiment
    model, params = program.evaluated, state.averaged
    if model.layout is None:  # pmap keeps a copy on every device
        params = jax.tree.map(lambda x: x.addressable_data(0), params)
    given = params, tokenizer, experiment.model.adapters, experiment.data.layout, plan(experiment)
    results = evaluate(model, *given, proceed=proceed)
    as_trained = [name for name, task in experiment.evaluation.tasks.items() if task.as_trained]
    metric = pick(results["tasks"], experiment.train.metric, as_trained)
    return float(processes.agree("metric", repr(metric))), results


def pick(tasks: dict[str, dict[str, Any]], metric: str, mean_of: Sequence[str] = ()) -> float:
    """The figure of that name: "loss" is the mean over tasks, those of `mean_of` if it names any.

    Raises:
        UserError: if it was not measured.
    """
    if metric == "loss":
        return statistics.fmean(tasks[name]["loss"] for name in mean_of or tasks)
    task, _, measure = metric.rpartition("/")
    if measure not in tasks[task]:
        raise UserError(
            f"train.metric is {metric!r}, and {task} has {', '.join(sorted(tasks[task]))}: "
            "choose one of these, or train.evaluate full"
        )
    return float(tasks[task][measure])
