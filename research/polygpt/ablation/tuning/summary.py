"""Summary of a search: the best trials or the Pareto front, and the importance of each dimension."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any

from polygpt.ablation.tune import Search
from polygpt.ablation.tuning.storage import Storage
from polygpt.files import plain
from polygpt.spec import Spec, class_name

LEAST = 4
"""Minimum number of complete trials for estimating importances."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Results of a search.

    Attributes:
        search: the search.
        trials: finished trials, as returned by `_plainly`, in order.
        best: number of the best trial, or numbers of the Pareto front from the cheapest; empty if none is complete.
        failed: failed trials with their "number", "values" and "reason".
        importance: share of each dimension, by evaluator ("fANOVA", "PED-ANOVA"); {} with too few trials.
    """

    search: Search
    trials: list[dict[str, Any]]
    best: list[int]
    failed: list[dict[str, Any]]
    importance: dict[str, dict[str, float]]

    def trial(self, number: int) -> dict[str, Any]:
        """The trial with that number."""
        return next(trial for trial in self.trials if trial["number"] == number)

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        chosen = [self.trial(number) for number in self.best]
        words = [self.command(trial) for trial in chosen]
        found = [{**trial, "overrides": said} for trial, said in zip(chosen, words, strict=True)]
        return plain(
            {
                "metric": self.search.metric,
                "best": found,
                "importance": self.importance,
                "trials": self.trials,
                "failed": self.failed,
            }
        )

    def command(self, trial: Mapping[str, Any]) -> list[str] | None:
        """Command-line overrides for a trial's experiment; None if they cannot be written as text."""
        words = []
        for name, dimension in self.search.dimensions.items():
            for field, value in dimension.changes(name, trial["values"][name]).items():
                if (text := _text(value)) is None:
                    return None
                words += [f"--{field}", text]
        return words


def summarize(storage: Storage) -> Summary:
    """Reads the trials and estimates importances."""
    search, complete = storage.search, storage.complete_ones()
    best = sorted(storage.study.best_trials, key=lambda trial: trial.values[::-1]) if complete else []
    made = [_plainly(search, trial, trial in complete) for trial in storage.finished()]
    numbers = [trial.number for trial in best]
    failed = [
        {"number": trial.number, "values": dict(trial.params), "reason": trial.user_attrs["reason"]}
        for trial in storage.failed()
    ]
    best = numbers if search.against else numbers[:1]
    return Summary(search, made, best, failed, _importance(storage, complete))


def objectives(search: Search) -> list[str]:
    """Names of the objectives."""
    return [search.metric, *([search.against] if search.against else [])]


def _plainly(search: Search, trial: Any, complete: bool) -> dict[str, Any]:
    """A trial as data: "number", "values" of the dimensions, "objectives" (null if pruned), "reason" for pruning,
    "curve" of the metric by percent of the run, "parameters", "flops", "steps", "seconds"."""
    begun, ended = trial.datetime_start, trial.datetime_complete
    reason = None if complete else trial.user_attrs.get("reason", "pruned")
    return {
        "number": trial.number,
        "values": {name: trial.params.get(name) for name in search.dimensions},
        "objectives": dict(zip(objectives(search), trial.values, strict=True)) if complete else None,
        "reason": reason,
        "curve": sorted(trial.intermediate_values.items()),
        **{name: trial.user_attrs.get(name) for name in ("parameters", "flops", "steps")},
        "seconds": (ended - begun).total_seconds() if begun and ended else None,
    }


def _importance(storage: Storage, complete: list[Any]) -> dict[str, dict[str, float]]:
    """fANOVA: the share of the variance that a random forest attributes to a dimension alone (Hutter et al., ICML
    2014). PED-ANOVA: divergence between the values of good trials and of all trials (Watanabe et al., 2304.10255)."""
    module = storage.optuna.importance
    if len(complete) < LEAST or len({trial.values[0] for trial in complete}) == 1:
        return {}
    made = {"fANOVA": module.FanovaImportanceEvaluator(seed=storage.search.seed)}
    made["PED-ANOVA"] = module.PedAnovaImportanceEvaluator()
    sign = 1 if storage.search.direction == "lower" else -1  # PED-ANOVA minimises
    found = {}
    for name, evaluator in made.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                shares = module.get_param_importances(
                    storage.study, evaluator=evaluator, target=lambda trial: sign * trial.values[0]
                )
        except (RuntimeError, ValueError):  # too few trials, or too similar
            continue
        found[name] = dict(shares)
    return found


def _text(value: Any) -> str | None:
    """A value as command-line text; None if it has no such form."""
    if isinstance(value, Spec):
        try:
            return class_name(type(value)) if value == type(value)() else None
        except TypeError:  # it has no defaults
            return None
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return value if isinstance(value, str) else None
