"""Finished runs compared: those whose configurations differ in the seed alone are samples of one group.

Two groups with the same seeds are paired by seed, since a seed gives both the same order of data. Otherwise they are
compared by Welch's t test, which takes no variance to be like the other.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import special

from polygpt import spec
from polygpt.ablation.record import finite_mean
from polygpt.ablation.statistics import (
    Compared,
    compare,
    holm,
    interval_bootstrap,
    interval_bootstrap_unpaired,
    interval_t,
    seeds_needed,
    superiority,
)
from polygpt.ablation.study import TRAINING_LOSS
from polygpt.ablation.tables import probability_of
from polygpt.errors import UserError
from polygpt.markup import Table, probability, span, with_interval
from polygpt.report.finish import RESULTS
from polygpt.spec import nearest
from polygpt.training.workdir import differences, drop_same_mathematics, load_experiment

ALPHA = 0.05
"""The chance that any of the differences found is none."""
NAMED = 3
"""Fields that a group is named by, at most."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run folder says of a run.

    Attributes:
        folder: where.
        seed: its seed.
        config: its configuration as JSON, without what makes no other experiment of it.
        metrics: by name, "task/measure" and "train/loss".
    """

    folder: Path
    seed: int
    config: dict[str, Any]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        name: by what it differs from the others.
        runs: by seed.
        values: of the metric, as long.
        compared: beside the first group; None for the first itself.
        how: "paired" or "Welch".
        better: the chance that a run is better than one of the first group; None for the first itself.
        adjusted: p by Holm's method over the groups; None for the first itself.
        seeds_needed: seeds of each group that would show such an effect; None for the first itself, where the groups do
            not have the same seeds, or where no number would do.
    """

    name: str
    runs: tuple[FinishedRun, ...]
    values: tuple[float, ...]
    compared: Compared | None
    how: Literal["paired", "Welch"] | None
    better: float | None
    adjusted: float | None = None
    seeds_needed: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Groups of runs, the metric, and the fields by which their configurations differ with each group's value."""

    metric: str
    better: Literal["lower", "higher"]
    groups: tuple[Group, ...]
    differences: dict[str, tuple[Any, ...]]


def compare_runs(folders: Sequence[str | Path], metric: str | None = None) -> Comparison:
    """Finished runs, in groups, the first group being that of the first folder.

    Args:
        folders: of runs.
        metric: "task/measure" or "train/loss"; by default the loss of the first held-out task that all measured, else
            the training loss.

    Raises:
        UserError: for a folder that is no run's, a run that is not finished, two runs that are the same, or a metric
            that a run does not have.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for folder in folders:
        run = finished_run(Path(folder))
        some = groups.setdefault(json.dumps(run.config, sort_keys=True), [])
        if other := next((other for other in some if other.seed == run.seed), None):
            raise UserError(f"{other.folder} and {run.folder} are the same run, seed {run.seed}: name one of them")
        some.append(run)
    found = [sorted(some, key=lambda run: run.seed) for some in groups.values()]
    metric = metric or _default([run for some in found for run in some])
    better = "lower" if metric.rpartition("/")[2] in ("loss", "perplexity", "bits_per_byte", "wer", "cer") else "higher"
    samples = [[_metric(run, metric) for run in some] for some in found]
    differing = fields([some[0].config for some in found])
    names = [_name(differing, i, some) for i, some in enumerate(found)]
    made = []
    for name, some, values in zip(names, found, samples, strict=True):
        compared, how = (None, None) if not made else _beside(some, values, found[0], samples[0])
        lower = compared and compared.superiority
        share = lower if lower is None or better == "lower" else 1 - lower
        made.append(Group(name, tuple(some), tuple(values), compared, how, share))
    adjusted = holm([group.compared.p for group in made[1:]])
    others = (_adjusted(group, float(p), len(adjusted)) for group, p in zip(made[1:], adjusted, strict=True))
    return Comparison(metric, better, (made[0], *others), differing)


def finished_run(folder: Path) -> FinishedRun:
    """What a run folder says. Errors as `compare_runs`."""
    experiment = load_experiment(folder)
    losses, evaluations = {}, {}
    for line in _lines(folder / "metrics.jsonl"):
        if "loss" in line:
            losses[line["step"]] = math.nan if line["loss"] is None else line["loss"]
        if "evaluation" in line:
            evaluations[line["step"]] = line["evaluation"]
    last = max([*losses, *evaluations], default=0)
    # A line of metrics comes every `log_every` steps: the last may be before the end.
    if last <= experiment.train.steps - experiment.train.log_every or not losses:
        steps = f"{experiment.train.steps:,}"
        raise UserError(f"{folder} is at step {last:,} of {steps}: finish it first, or train it again")
    tasks = evaluations.get(last, {})
    if (path := folder / RESULTS).is_file():
        tasks = {**tasks, **json.loads(path.read_text(encoding="utf-8"))["tasks"]}
    metrics = {f"{task}/{name}": value for task, measures in tasks.items() for name, value in measures.items()}
    tail = [loss for step, loss in losses.items() if step > 0.9 * experiment.train.steps] or [losses[max(losses)]]
    metrics[TRAINING_LOSS] = finite_mean(np.array(tail, float))
    return FinishedRun(folder, experiment.seed, _config(experiment), metrics)


def welch(a_S, b_T) -> Compared:
    """Two samples that are not paired: [S] and [T] finite values.

    Welch 1947, "The generalization of 'Student's' problem when several different population variances are involved":
    t with the degrees of freedom of Welch and Satterthwaite. The effect is Hedges' g, the difference over the pooled
    standard deviation without the bias of a small sample (Hedges 1981, "Distribution theory for Glass's estimator of
    effect size"). From fewer than two values of either, the interval is the whole line and p is 1.
    """
    a_S, b_T = np.asarray(a_S, np.float64), np.asarray(b_T, np.float64)
    n, m = len(a_S), len(b_T)
    difference = float(a_S.mean() - b_T.mean())
    known = {"mean": difference, "superiority": superiority(a_S, b_T), "seeds": min(n, m)}
    if min(n, m) < 2:
        whole = (-math.inf, math.inf)
        return Compared(**known, t=whole, bootstrap=whole, effect=None, p=1.0)
    parts = np.array([a_S.var(ddof=1) / n, b_T.var(ddof=1) / m])
    error = math.sqrt(parts.sum())
    if error <= 1e-12 * abs(difference) or error == 0:
        effect = math.copysign(math.inf, difference) if difference else 0.0
        point = (difference, difference)
        return Compared(**known, t=point, bootstrap=point, effect=effect, p=0.0 if difference else 1.0)
    freedom = parts.sum() ** 2 / (parts**2 / [n - 1, m - 1]).sum()
    half = float(special.stdtrit(freedom, 0.975)) * error
    pooled = math.sqrt(((n - 1) * a_S.var(ddof=1) + (m - 1) * b_T.var(ddof=1)) / (n + m - 2))
    k = n + m - 2
    unbiased = math.exp(math.lgamma(k / 2) - math.lgamma((k - 1) / 2)) / math.sqrt(k / 2)
    return Compared(
        **known,
        t=(difference - half, difference + half),
        bootstrap=interval_bootstrap_unpaired(a_S, b_T),
        effect=difference / pooled * unbiased,
        p=float(2 * special.stdtr(freedom, -abs(difference) / error)),
    )


def tables(found: Comparison) -> list[Table]:
    """The groups with their statistics, and the fields that differ."""
    first = found.groups[0].name
    rows = []
    for group in found.groups:
        values = np.array(group.values)
        seeds = ", ".join(str(run.seed) for run in group.runs)
        line = [group.name, seeds, with_interval(float(values.mean()), interval_t(values))]
        line.append(span(interval_bootstrap(values)))
        if group.compared is None:
            line += ["–"] * 6
        else:
            one = group.compared
            line += [with_interval(one.mean, one.t), group.how, probability(group.adjusted)]
            line += [_effect(one.effect), probability_of(group.better)]
            line.append("" if group.adjusted <= ALPHA else f"{group.seeds_needed:,}" if group.seeds_needed else "–")
        rows.append(line)
    heads = ["runs", "seeds", found.metric, "bootstrap", f"minus {first}", "test", "p (Holm)", "effect size"]
    heads += ["P(better)", "seeds to settle it"]
    notes = [f"± and intervals 95 %; {found.better} is better; p is two-sided, by Holm's method over all groups."]
    made = [Table(f"Runs compared: {found.metric}", heads, rows, notes=notes)]
    if found.differences:
        lines = [[name, *map(_text, values)] for name, values in found.differences.items()]
        made.append(Table("Fields that differ", ["field", *(group.name for group in found.groups)], lines))
    return made


def fields(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The dotted fields in which JSON configurations differ, with the value of each; None where it is missing."""
    names: dict[str, None] = {}
    for config in configs[1:]:
        names |= dict.fromkeys(name for name, _, _ in differences(configs[0], config))
    # Where one is a leaf elsewhere and a tree here, the tree is told as a whole.
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return {name: tuple(_at(config, name) for config in configs) for name in outer}


def _beside(some, values, first, first_values) -> tuple[Compared, Literal["paired", "Welch"]]:
    if [run.seed for run in some] == [run.seed for run in first]:
        return compare(values, first_values), "paired"
    return welch(values, first_values), "Welch"


def _adjusted(group: Group, p: float, groups: int) -> Group:
    effect = group.compared.effect
    needed = seeds_needed(effect, ALPHA / groups) if group.how == "paired" and effect else None
    return dataclasses.replace(group, adjusted=p, seeds_needed=needed)


def _config(experiment) -> dict[str, Any]:
    data = json.loads(json.dumps(spec.to_json(experiment.replace(seed=0, name="any"))))
    drop_same_mathematics(data)
    return data


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: it was never trained")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number} is not JSON: is it being written?") from None


def _default(runs: Sequence[FinishedRun]) -> str:
    """The loss of a held-out task that all runs have, or the training loss."""
    shared = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    losses = [name for name in shared if name.endswith("/loss") and name != TRAINING_LOSS]
    return losses[0] if losses else TRAINING_LOSS


def _metric(run: FinishedRun, metric: str) -> float:
    if metric not in run.metrics:
        raise UserError(f"{run.folder}: no metric {metric!r}: {nearest(metric, run.metrics)}")
    value = run.metrics[metric]
    if value is None or not math.isfinite(value):
        raise UserError(f"{run.folder}: {metric} is not finite: its training diverged")
    return float(value)


def _name(differing: Mapping[str, tuple[Any, ...]], i: int, some: Sequence[FinishedRun]) -> str:
    """By the fields that differ, if they are few and short; else by the folder of the first run."""
    words = [f"{name.rpartition('.')[2]} {_text(values[i])}" for name, values in differing.items()]
    name = ", ".join(words)
    return name if 0 < len(words) <= NAMED and len(name) <= 48 else some[0].folder.name


def _at(config: Any, name: str) -> Any:
    for part in name.split("."):
        if isinstance(config, Mapping):
            config = config.get(part)
        elif isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        else:
            return None
    return config


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "class" in value:
        value = value["class"].rpartition(":")[2]
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.rpartition(":")[2] if text.startswith("polygpt.") else text
    return text if len(text) <= 40 else text[:37] + "..."


def _effect(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
