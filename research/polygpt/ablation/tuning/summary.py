"""What a search has found: the best values, or the front of two objectives; how much each knob matters; a report."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polygpt.ablation.tune import Search
from polygpt.ablation.tuning import pictures
from polygpt.ablation.tuning.storage import Storage
from polygpt.files import plain, write_atomically
from polygpt.report.charts import figure
from polygpt.spec import Spec, class_name

LEAST = 4
"""Trials that must be complete before the importance of knobs is estimated."""
REPORT, SUMMARY = "report.md", "summary.json"
LONGEST = 100
"""Rows of the table of trials, at most."""
ROUGH = 30
"""Complete trials below which importances carry a caveat."""
CAVEAT = "Importances from {} trials are a rough guide: further trials may well reverse their order."


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of a search.

    Attributes:
        search: what was searched.
        trials: those that are done, as `_plainly` gives them, in order.
        best: the numbers of the best trial, or of those on the front, from the cheapest on; empty if none is complete.
        failed: those that do not count, with their "number", "values" and "reason".
        importance: by evaluator ("fANOVA", "PED-ANOVA"), by knob, its share of the whole; {} with too few trials.
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
        for name, knob in self.search.knobs.items():
            for field, value in knob.changes(name, trial["values"][name]).items():
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


def write(summary: Summary, folder: Path) -> Path:
    """Writes report, pictures and the whole as JSON; the report's place."""
    drawn = pictures.draw(summary, folder)
    write_atomically(folder / SUMMARY, json.dumps(summary.to_json(), indent=1, allow_nan=False) + "\n")
    write_atomically(folder / REPORT, markdown(summary, drawn))
    return folder / REPORT


def tables(summary: Summary) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows): the best trials, and the importance of knobs."""
    knobs = list(summary.search.knobs)
    columns = ["trial", *objectives(summary.search), *knobs]
    rows = [[str(trial["number"]), *_figures(trial, knobs)] for trial in map(summary.trial, summary.best)]
    title = "best" if summary.search.against is None else "front: no other trial is better in both"
    made = [(title, columns, rows)] if rows else []
    if summary.importance:
        order = sorted(knobs, key=lambda name: -next(iter(summary.importance.values())).get(name, 0.0))
        rows = [[name, *(f"{shares.get(name, 0.0):.2f}" for shares in summary.importance.values())] for name in order]
        made.append(("importance: the share of what differs between trials", ["knob", *summary.importance], rows))
    return made


def objectives(search: Search) -> list[str]:
    """What trials are compared by."""
    return [search.metric, *([search.against] if search.against else [])]


def markdown(summary: Summary, drawn: Sequence[str]) -> str:
    """The report."""
    search, trials = summary.search, summary.trials
    complete = sum(trial["reason"] is None for trial in trials)
    how = f"{search.sampler}, seed {search.seed}" + (f", pruning by {search.pruning}" if search.pruning else "")
    parts = [
        f"# {search.base.name}: {' against '.join(objectives(search))}, {search.direction} is better",
        f"{len(trials)} of {search.trials} trials are done, of which {complete} ran to their end ({how}).",
    ]
    if summary.failed:
        said = "; ".join(f"{one['number']}: {one['reason']}" for one in summary.failed)
        parts.append(f"{len(summary.failed)} trials do not count: the machine may be to blame ({said}).")
    if summary.importance and complete < ROUGH:
        parts.append(CAVEAT.format(complete))
    for title, columns, rows in tables(summary):
        parts += [f"## {title[0].upper()}{title[1:]}", _table(columns, rows)]
    if len(summary.best) == 1 and (words := summary.command(summary.trial(summary.best[0]))) is not None:
        parts += ["To train so:", f"```\npolygpt train FILE {' '.join(words)}\n```"]
    parts += [f"![{name.rpartition('.')[0]}]({name})" for name in drawn]
    knobs = list(search.knobs)
    rows = [[str(trial["number"]), *_figures(trial, knobs), trial["reason"] or ""] for trial in trials[-LONGEST:]]
    parts += ["## Trials", _table(["trial", *objectives(search), *knobs, ""], rows)]
    return "\n\n".join(parts) + "\n"


def _plainly(search: Search, trial: Any, complete: bool) -> dict[str, Any]:
    """A trial as data: "number", "values" of the knobs, "objectives" (null where it was given up), "reason" why it was,
    "curve" of the metric over hundredths of the run, "parameters", "flops", "steps", "seconds"."""
    begun, ended = trial.datetime_start, trial.datetime_complete
    reason = None if complete else trial.user_attrs.get("reason", "given up")
    return {
        "number": trial.number,
        "values": {name: trial.params.get(name) for name in search.knobs},
        "objectives": dict(zip(objectives(search), trial.values, strict=True)) if complete else None,
        "reason": reason,
        "curve": sorted(trial.intermediate_values.items()),
        **{name: trial.user_attrs.get(name) for name in ("parameters", "flops", "steps")},
        "seconds": (ended - begun).total_seconds() if begun and ended else None,
    }


def _importance(storage: Storage, complete: list[Any]) -> dict[str, dict[str, float]]:
    """fANOVA: the share of the variance that a forest of trees explains by a knob alone (Hutter et al., ICML 2014).
    PED-ANOVA: how far the good trials' values differ from all trials' (Watanabe et al., 2304.10255)."""
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


def _figures(trial: Mapping[str, Any], knobs: Sequence[str]) -> list[str]:
    """The objectives of a trial and its values, as a table shows them."""
    values = list((trial["objectives"] or {"": None}).values())
    shown = ["–" if value is None else figure(value) for value in values]
    return shown + [figure(v) if isinstance(v := trial["values"][name], float) else str(v) for name in knobs]


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


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
