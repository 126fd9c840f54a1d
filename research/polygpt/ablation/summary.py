"""The results of an ablation in numbers: intervals, differences, costs, and verdicts on its claims."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polygpt.ablation.claims import Verdict, judge
from polygpt.ablation.intervals import complete, interval_bootstrap, interval_t
from polygpt.ablation.results import Frame
from polygpt.ablation.statistics import Compared, compare
from polygpt.ablation.variants import Name
from polygpt.spec import counted

_TAKES = ("parameters", "flops", "steps", "tokens")


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant at one value of every factor.

    Attributes:
        variant: its name.
        at: the value of each factor.
        seeds: number of seeds with a result.
        mean: mean of the metric; None without seeds.
        t, bootstrap: 95 % intervals (low, high) of the mean.
        compared: comparison with the first variant at the same values; None for the first variant.
        better: probability that a run is better than one of the first variant; None for the first variant.
        paper: the paper's figure; None without one.
        diverged: number of seeds that count as diverged.
    """

    variant: str
    at: dict[str, Name]
    seeds: int
    mean: float | None
    t: tuple[float, float]
    bootstrap: tuple[float, float]
    compared: Compared | None
    better: float | None
    paper: float | None
    diverged: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a variant's runs.

    Attributes:
        variant, at: which runs; `at` has only the factors that change the cost.
        runs: number of runs.
        tuned: the values of the tuned grid that were chosen.
        parameters: number of parameters.
        flops: FLOPs per run, forward and backward, by formula.
        steps, tokens: per run; tokens are batch positions.
        seconds: mean wall time per run.
        diverged: number of runs that diverged.
    """

    variant: str
    at: dict[str, Name]
    runs: int
    tuned: tuple[Name, ...]
    parameters: int
    flops: float
    steps: int
    tokens: int
    seconds: float
    diverged: int


def rows(frame: Frame) -> list[Row]:
    """Every variant at every combination of values of all factors, including the one in `reads`."""
    first = next(iter(frame.values))
    paper = frame.ablation.paper
    found = []
    for variant, values in frame.values.items():
        for at, x_S, first_S in zip(combinations(frame), columns(values), columns(frame.values[first]), strict=True):
            kept = complete(x_S)
            compared = None if variant == first else compare(x_S, first_S)
            lower = compared and compared.superiority
            found.append(
                Row(
                    variant=variant,
                    at=at,
                    seeds=len(kept),
                    mean=float(kept.mean()) if len(kept) else None,
                    t=interval_t(x_S),
                    bootstrap=interval_bootstrap(x_S),
                    compared=compared,
                    better=lower if lower is None or frame.ablation.measure.better == "lower" else 1 - lower,
                    paper=paper.figures.get(variant) if paper else None,
                    diverged=int((kept == frame.ablation.diverged).sum()),
                )
            )
    return found


def costs(frame: Frame) -> list[Cost]:
    """Costs per variant and value of the factors on which they depend."""
    whole = [record for record in frame.records if not record["diverged"]] or frame.records
    kept = [factor for factor in frame.ablation.over if _matters(factor, whole)]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in frame.records:
        at = {factor: record["at"][factor] for factor in kept}
        groups.setdefault(repr((record["variant"], at)), []).append({**record, "at": at})
    found = []
    for lines in groups.values():
        most = max(lines, key=lambda line: line["steps"])  # a diverged run has fewer
        same = {name: most[name] for name in ("variant", "at", *_TAKES)}
        tuned = tuple(dict.fromkeys(line["tuned"] for line in lines if line["tuned"] is not None))
        seconds = math.fsum(line["seconds"] for line in lines) / len(lines)
        diverged = sum(line["diverged"] for line in lines)
        found.append(Cost(**same, tuned=tuned, runs=len(lines), seconds=seconds, diverged=diverged))
    return found


def _matters(factor: str, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the cost of a run depends on the factor."""
    seen: dict[str, tuple] = {}
    for record in records:
        others = {name: value for name, value in record["at"].items() if name != factor}
        takes = tuple(record[name] for name in _TAKES)
        if seen.setdefault(repr((record["variant"], others)), takes) != takes:
            return True
    return False


def verdicts(frame: Frame) -> list[Verdict]:
    """Verdicts on the ablation's claims."""
    ablation = frame.ablation
    return judge(frame.values, frame.axes, ablation.claims, noise=ablation.noise, better=ablation.measure.better)


def best_rows(found: Sequence[Row], better: str) -> list[int]:
    """For every combination of factors the row with the best mean, the first of equals; none for a single variant."""
    best: dict[str, int] = {}
    if len({row.variant for row in found}) == 1:
        return []
    for i, row in enumerate(found):
        before = best.get(key := repr(row.at))
        if row.mean is None or row.diverged == row.seeds:
            continue
        if before is None or (row.mean < found[before].mean if better == "lower" else row.mean > found[before].mean):
            best[key] = i
    return list(best.values())


def best_place(frame: Frame, variant: str) -> dict[str, Name]:
    """The values of the factors in `over` at which the variant's mean over seeds is best."""
    shape = [len(values) for values in frame.ablation.over.values()]
    values = frame.values[variant].reshape(len(frame.seeds), math.prod(shape), -1).mean(axis=2)
    means = np.array([x.mean() if len(x := complete(x_S)) else math.nan for x_S in columns(values)])
    if not np.isfinite(means).any():
        means = np.zeros(len(means))
    best = (np.nanargmin if frame.ablation.measure.better == "lower" else np.nanargmax)(means)
    index = np.unravel_index(best, shape) if shape else ()
    return {factor: frame.axes[factor][i] for factor, i in zip(frame.ablation.over, index, strict=True)}


def missing(frame: Frame) -> str:
    """A sentence about the runs of the comparison that are missing, or ""."""
    places = math.prod(len(values) for values in frame.ablation.over.values())
    seeds = max(frame.ablation.seeds, len(frame.seeds))
    asked = len(frame.ablation.variants) * places * seeds
    lacking = asked - len(frame.records)
    return f"{lacking} of {asked} runs are missing ({counted(seeds, 'seed')} of each)." if lacking > 0 else ""


def combinations(frame: Frame) -> Iterator[dict[str, Name]]:
    """Every combination of values of all factors, in the order of `columns`."""
    for index in np.ndindex(*map(len, frame.axes.values())):
        yield {factor: frame.axes[factor][i] for factor, i in zip(frame.axes, index, strict=True)}


def columns(values: np.ndarray) -> Iterator[np.ndarray]:
    """The samples [S] of an array [S, ...], the last axis fastest."""
    yield from values.reshape(len(values), -1).T
