"""The run's metric on held-out data, and its progress."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from polygpt.data.layout import MediaCache
from polygpt.errors import UserError
from polygpt.evaluation.evaluate import evaluate
from polygpt.evaluation.spec import EvaluationSpec
from polygpt.runtime import processes
from polygpt.training.experiment import Experiment, TrainSpec
from polygpt.training.plateau import Plateau
from polygpt.training.program import Program
from polygpt.training.seeds import select_seed, stopped_seeds
from polygpt.training.state import State


@dataclasses.dataclass
class MetricState:
    """The progress of the run's metric.

    Attributes:
        best: the best so far.
        stale: number of evaluations since then.
        pending: whether this step's evaluation is still pending.
        waited: number of evaluations since the best, or since the learning rate was lowered.
        reductions: how many times it was lowered.
    """

    best: float | None = None
    stale: int = 0
    pending: bool = False
    waited: int = 0
    reductions: int = 0

    @classmethod
    def restored(cls, data: Mapping[str, Any]) -> "MetricState":
        """That of a checkpoint; before schema 5, `pending` was called `owed`."""
        return cls(**{"pending" if name == "owed" else name: value for name, value in data.items()})

    def update(self, metric: float, better: str, plateau: Plateau | None = None) -> bool:
        """Records a new metric; True if it is the best."""
        self.pending = False
        sign = 1 if better == "lower" else -1
        improved = math.isfinite(metric) and (self.best is None or sign * metric < sign * self.best)
        self.best, self.stale = (metric, 0) if improved else (self.best, self.stale + 1)
        self.waited = 0 if improved else self.waited + 1
        if plateau is not None and self.waited >= plateau.patience:
            self.waited, self.reductions = 0, self.reductions + 1
        return improved


def follow(train: TrainSpec, standing: MetricState, metric: float, state: State) -> tuple[State, bool]:
    """Records a new metric in `standing`. Returns the state, with a lower learning rate on a plateau, and whether it is
    the best."""
    improved = standing.update(metric, train.better, train.plateau)
    if train.plateau is None:
        return state, improved
    rate = jax.device_put(np.float32(train.plateau.scale(standing.reductions)), state.rate.sharding)
    return dataclasses.replace(state, rate=rate), improved


def plan(experiment: Experiment) -> EvaluationSpec:
    """The evaluation during training: losses only, unless `train.evaluate` is "full"."""
    held_out = experiment.evaluation
    if experiment.train.evaluate == "full":
        return held_out
    tasks = {name: task.replace(generate=False) for name, task in held_out.tasks.items()}
    return held_out.replace(modality_gain=False, tasks=tasks)


def measure(
    program: Program, state: State, tokenizer, proceed: Callable[[], None] = lambda: None
) -> tuple[float, dict[str, Any]]:
    """The run's metric, equal in all processes, and the results of `evaluate` with the averaged parameters.

    `proceed` is called before each batch; an exception from it ends the evaluation.

    Several seeds have no common metric: it is NaN, and the results are {"seeds": results of each, {} where stopped}.

    Raises:
        UserError: a held-out record is invalid, or `train.metric` was not measured.
    """
    experiment, model, params = program.experiment, program.evaluated, state.eval_params
    if model.layout is None:  # pmap keeps a copy on every device
        params = jax.tree.map(lambda x: x.addressable_data(0), params)
    data, cache = experiment.data, MediaCache(experiment.data.cache)

    def results_of(params) -> dict[str, Any]:
        given = program.merge(params), tokenizer, experiment.model.adapters, data.layout, plan(experiment)
        return evaluate(model.merged, *given, proceed=proceed, cache=cache)

    if program.seeds:
        stopped = stopped_seeds(state, experiment.train.max_nonfinite)
        return math.nan, {
            "seeds": [{} if stopped[i] else results_of(select_seed(params, i)) for i in range(len(stopped))]
        }
    results = results_of(params)
    as_trained = [name for name, task in experiment.evaluation.tasks.items() if task.as_trained]
    metric = select_metric(results["tasks"], experiment.train.metric, as_trained)
    return float(processes.broadcast("metric", repr(metric))), results


def select_metric(tasks: dict[str, dict[str, Any]], metric: str, mean_of: Sequence[str] = ()) -> float:
    """The metric with that name: "loss" is the mean over the tasks in `mean_of`, or over all if it is empty,
    as far as they predict text.

    Raises:
        UserError: the metric was not measured.
    """
    if metric == "loss":
        losses = [tasks[name]["loss"] for name in mean_of or tasks if "loss" in tasks[name]]
        if not losses:
            raise UserError("train.metric is 'loss', but no held-out task predicts text: choose '<task>/<measure>'")
        return statistics.fmean(losses)
    task, _, measure = metric.rpartition("/")
    if measure not in tasks[task]:
        raise UserError(
            f"train.metric is {metric!r}, but {task} has only {', '.join(sorted(tasks[task]))}: "
            "choose one of these, or train.evaluate full"
        )
    return float(tasks[task][measure])
