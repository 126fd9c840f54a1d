"""Comparison of finished runs: runs whose configurations differ only in the seed are samples of one group.

Two groups with the same seeds are paired by seed, since a seed gives both the same order of data, and tested as
`statistics.one_sided` describes. Other groups are compared by Welch's t test, which assumes normal samples of unequal
variance.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy

from polygpt.ablation.finished import FinishedRun, finished_run
from polygpt.ablation.intervals import interval_bootstrap, interval_bootstrap_unpaired, interval_t
from polygpt.ablation.measures import MEASURES, TRAINING_LOSS
from polygpt.ablation.statistics import (
    Compared,
    compare,
    effect_range,
    hedges,
    holm,
    seeds_needed,
    seeds_range,
    superiority,
    t_statistic,
)
from polygpt.ablation.tables import SETTLES, caveats, probability_of, seeds_text
from polygpt.errors import UserError
from polygpt.markup import Table, probability, span, with_interval
from polygpt.spec import differences, nearest

ALPHA = 0.05
"""Probability that any difference found is not real."""
NAMED = 3
"""Maximum number of fields in a group's name."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed.

    Attributes:
        name: the fields in which it differs from other groups.
        runs: the runs, ordered by seed.
        values: the metric of each run.
        compared: comparison with the first group. This and the fields below are None for the first group itself.
        how: "paired" or "Welch".
        better: probability that a run is better than one of the first group.
        adjusted: p by Holm's method over the groups.
        seeds_needed: seeds per group that would show such an effect; None if the groups have different seeds, or no
            number is enough.
        seeds_range: (fewest, most) for the 10 to 90 % range of what the effect may be, see `Verdict`.
    """

    name: str
    runs: tuple[FinishedRun, ...]
    values: tuple[float, ...]
    compared: Compared | None
    how: Literal["paired", "Welch"] | None
    better: float | None
    adjusted: float | None = None
    seeds_needed: int | None = None
    seeds_range: tuple[int, int | None] | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Groups of runs compared.

    Attributes:
        metric: what is compared.
        better: which values of it are better.
        groups: the groups; all others are compared with the first.
        differences: by dotted field, the value in each group, where they differ.
        notes: what a reader should know.
    """

    metric: str
    better: Literal["lower", "higher"]
    groups: tuple[Group, ...]
    differences: dict[str, tuple[Any, ...]]
    notes: tuple[str, ...] = ()


def compare_runs(
    folders: Sequence[str | Path], metric: str | None = None, better: Literal["lower", "higher"] | None = None
) -> Comparison:
    """Groups finished runs and compares every group with that of the first folder.

    Args:
        folders: run folders.
        metric: "task/measure" or "train/loss"; by default the loss of the first held-out task that all runs measured,
            or the training loss, with a note, if there is none.
        better: which values of the metric are better; default: as the metric declares.

    Raises:
        UserError: a folder is not a run folder, a run is not finished, two runs are the same, a run lacks the metric,
            or its direction is unknown.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for folder in folders:
        run = finished_run(Path(folder))
        some = groups.setdefault(json.dumps(run.config, sort_keys=True), [])
        if other := next((other for other in some if other.seed == run.seed), None):
            raise UserError(f"{other.folder} and {run.folder} are the same run, seed {run.seed}: name one of them")
        some.append(run)
    found = [sorted(some, key=lambda run: run.seed) for some in groups.values()]
    runs = [run for some in found for run in some]
    metric, notes = (metric, []) if metric else _default(runs)
    notes += [
        f"{run.folder} stopped early, at step {run.step:,} of {run.experiment.train.steps:,} (train.patience)."
        for run in runs
        if run.step <= run.experiment.train.steps - run.experiment.train.log_every
    ]
    samples = [[_metric(run, metric) for run in some] for some in found]
    better = better or _direction(runs[0], metric)
    differing = fields([some[0].config for some in found])
    names = [_name(differing, i, some) for i, some in enumerate(found)]
    made = []
    for name, some, values in zip(names, found, samples, strict=True):
        compared, how = (None, None) if not made else _beside(some, values, found[0], samples[0])
        lower = compared and compared.superiority
        share = lower if lower is None or better == "lower" else 1 - lower
        made.append(Group(name, tuple(some), tuple(values), compared, how, share))
    adjusted = holm([group.compared.p for group in made[1:]])
    others = (_adjusted(group, made[0], float(p), len(adjusted)) for group, p in zip(made[1:], adjusted, strict=True))
    return Comparison(metric, better, (made[0], *others), differing, tuple(notes))


def welch(a_S, b_T) -> Compared:
    """Compares two unpaired samples, [S] and [T] finite values.

    Welch's t test (Welch 1947, "The generalization of 'Student's' problem when several different population variances
    are involved"). The effect is Hedges' g, the difference over the pooled standard deviation without small-sample
    bias. With fewer than two values in either sample the interval is the whole line and p is 1.
    """
    a_S, b_T = np.asarray(a_S, np.float64), np.asarray(b_T, np.float64)
    n, m = len(a_S), len(b_T)
    difference = float(a_S.mean() - b_T.mean())
    known = {"mean": difference, "superiority": superiority(a_S, b_T), "seeds": min(n, m)}
    if min(n, m) < 2:
        whole = (-math.inf, math.inf)
        return Compared(**known, t=whole, bootstrap=whole, effect=None, p=1.0)
    error = math.sqrt(a_S.var(ddof=1) / n + b_T.var(ddof=1) / m)
    if error <= 1e-12 * abs(difference) or error == 0:
        effect = math.copysign(math.inf, difference) if difference else 0.0
        point = (difference, difference)
        return Compared(**known, t=point, bootstrap=point, effect=effect, p=0.0 if difference else 1.0)
    test = scipy.stats.ttest_ind(a_S, b_T, equal_var=False)
    pooled = math.sqrt(((n - 1) * a_S.var(ddof=1) + (m - 1) * b_T.var(ddof=1)) / (n + m - 2))
    return Compared(
        **known,
        t=tuple(map(float, test.confidence_interval(0.95))),
        bootstrap=interval_bootstrap_unpaired(a_S, b_T),
        effect=difference / pooled * hedges(n + m - 2),
        p=float(test.pvalue),
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
            line.append("" if group.adjusted <= ALPHA else seeds_text(group.seeds_needed, group.seeds_range))
        rows.append(line)
    heads = ["runs", "seeds", found.metric, "bootstrap", f"minus {first}", "test", "p (Holm)", "effect size"]
    heads += ["P(better)", "seeds needed"]
    notes = [
        *found.notes,
        f"± and intervals 95 %; {found.better} is better; p is two-sided, by Holm's method over all groups.",
        *caveats(min(len(group.runs) for group in found.groups), len(found.groups) > 1),
    ]
    notes += [SETTLES] if any(group.seeds_needed for group in found.groups) else []
    notes += [
        f"{group.name}: differences are skewed ({group.compared.skewed:+.1f}): p is approximate, use more seeds."
        for group in found.groups[1:]
        if group.compared.skewed is not None
    ]
    made = [Table(f"Runs compared: {found.metric}", heads, rows, notes=notes)]
    if found.differences:
        lines = [[name, *map(_text, values)] for name, values in found.differences.items()]
        made.append(Table("Fields that differ", ["field", *(group.name for group in found.groups)], lines))
    return made


def fields(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The dotted fields in which JSON configurations differ, with the value in each; None where it is missing."""
    names: dict[str, None] = {}
    for config in configs[1:]:
        names |= dict.fromkeys(name for name, _, _ in differences(configs[0], config))
    # A field that is a leaf in one configuration and a tree in another is shown in full.
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return {name: tuple(_at(config, name) for config in configs) for name in outer}


def _beside(some, values, first, first_values) -> tuple[Compared, Literal["paired", "Welch"]]:
    if [run.seed for run in some] == [run.seed for run in first]:
        return compare(values, first_values), "paired"
    return welch(values, first_values), "Welch"


def _adjusted(group: Group, first: Group, p: float, groups: int) -> Group:
    effect = group.compared.effect
    if group.how != "paired" or not effect:
        return dataclasses.replace(group, adjusted=p)
    t = abs(t_statistic(np.subtract(group.values, first.values)))
    needed = seeds_needed(effect, ALPHA / groups)
    span = needed and seeds_range([effect_range(float(t), len(group.values))], ALPHA / groups)
    return dataclasses.replace(group, adjusted=p, seeds_needed=needed, seeds_range=span)


def _default(runs: Sequence[FinishedRun]) -> tuple[str, list[str]]:
    """The loss of the first held-out task that all runs measured, else the training loss with a note on why."""
    losses = [[name for name in run.metrics if name.endswith("/loss") and name != TRAINING_LOSS] for run in runs]
    shared = [name for name in losses[0] if all(name in own for own in losses)]
    if shared:
        return shared[0], []
    lacking = [str(run.folder) for run, own in zip(runs, losses, strict=True) if not own]
    some = ", ".join(lacking[:NAMED]) + (f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else "")
    why = f"{some} without an evaluation: polygpt evaluate RUN" if lacking else "the runs share no held-out task"
    return TRAINING_LOSS, [f"Compared by {TRAINING_LOSS} ({why})."]


def _direction(run: FinishedRun, metric: str) -> Literal["lower", "higher"]:
    task, _, name = metric.rpartition("/")
    tasks = run.experiment.evaluation.tasks
    known = MEASURES.get(metric) or (tasks[task].measures().get(name) if task in tasks else None)
    if known is None or known.better is None:
        raise UserError(
            f"{metric} does not declare a direction: write --better lower or --better higher, or list it in "
            "`measures` of its metric"
        )
    return known.better


def _metric(run: FinishedRun, metric: str) -> float:
    if metric not in run.metrics:
        raise UserError(f"{run.folder}: no metric {metric!r}: {nearest(metric, run.metrics)}")
    value = run.metrics[metric]
    if value is None or not math.isfinite(value):
        raise UserError(f"{run.folder}: {metric} is not finite: training diverged, exclude the run")
    return float(value)


def _name(differing: Mapping[str, tuple[Any, ...]], i: int, some: Sequence[FinishedRun]) -> str:
    """The fields that differ, if they are few and short; else the folder of the first run."""
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
