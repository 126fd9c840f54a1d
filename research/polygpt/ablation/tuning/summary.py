"""What a search has found: the best values, or the front of two objectives; how much each dimension matters; a
report."""

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
"""Trials that must be complete before the importance of dimensions is estimated."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of a search.

    Attributes:
        search: what was searched.
        trials: those that are done, as `_plainly` gives them, in order.
        best: the numbers of the best trial, or of those on the front, from the cheapest on; empty if none is complete.
        failed: those that do not count, with their "number", "values" and "reason".
        importance: by evaluator ("fANOVA", "PED-ANOVA"), by dimension, its share of the whole; {} with too few trials.
    """

    search: Search
    trials: list[dict[str, Any]]
    best: list[int]
    failed: list[dict[str, Any]]
    importance: dict[str, dict[str, float]]

    def trial(self, number: int) -> dict[str, Any]:
        """The trial of that number."""
        return next(trial for trial in self.trials if trial["number"] == number)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
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
        """The overrides of a command line that make a trial's experiment; None where no text says them."""
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
    """What trials are compared by."""
    return [search.metric, *([search.against] if search.against else [])]


def _plainly(search: Search, trial: Any, complete: bool) -> dict[str, Any]:
    """A trial as data: "number", "values" of the dimensions, "objectives" (null where it was given up), "reason" why it
    was, "curve" of the metric over hundredths of the run, "parameters", "flops", "steps", "seconds"."""
    begun, ended = trial.datetime_start, trial.datetime_complete
    reason = None if complete else trial.user_attrs.get("reason", "given up")
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
    """fANOVA: the share of the variance that a forest of trees explains by a dimension alone (Hutter et al., ICML
    2014). PED-ANOVA: how far the good trials' values differ from all trials' (Watanabe et al., 2304.10255)."""
    module = storage.optuna.importance
    if len(complete) < LEAST or len({trial.values[0] for trial in complete}) == 1:
        return {}
    made = {"fANOVA": module.FanovaImportanceEvaluator(seed=storage.search.seed)}
    made["PED-ANOVA"] = module.PedAnovaImportanceEvaluator()
    sign = 1 if storage.search.direction == "lower" else -1  # PED-ANOVA takes low ones for good
    found = {}
    for name, evaluator in made.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                shares = module.get_param_importances(
                    storage.study, evaluator=evaluator, target=lambda trial: sign * trial.values[0]
                )
        except (RuntimeError, ValueError):  # too few, or too much alike
            continue
        found[name] = dict(shares)
    return found


def _text(value: Any) -> str | None:
    """A value as a command line takes it; None if it takes none such."""
    if isinstance(value, Spec):
        try:
            return class_name(type(value)) if value == type(value)() else None
        except TypeError:  # it has no defaults
            return None
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return value if isinstance(value, str) else None
