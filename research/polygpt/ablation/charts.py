"""The plots of an ablation, as data: points with intervals, and curves with bands.

For a variant run over factors, learning curves are those of its best point. A point with diverged runs, or runs worse
than the value for divergence, is marked and has no mean.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from polygpt.ablation.intervals import complete, interval_t
from polygpt.ablation.measures import MEASURES
from polygpt.ablation.results import Frame
from polygpt.ablation.summary import best_place, columns, combinations
from polygpt.ablation.variants import Name
from polygpt.markup import alone, value_text

PANELS = 16
"""Maximum number of panels; with more, there is no plot."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One line or one point in a panel.

    Attributes:
        name: for the legend.
        x, y: positions and means; NaN without a mean.
        low, high: 95 % t intervals, of the same length as `y`; infinite if undefined.
        seeds: the value of each seed, for series of one point.
        diverged: x values at which runs diverged.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: tuple[float, ...] = ()
    diverged: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes with its labels."""

    title: str
    series: tuple[Series, ...]
    x_label: str
    y_label: str
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A plot.

    Attributes:
        name: file name without suffix.
        caption: one sentence.
        kind: points: one series per variant, each with one value; curves: lines with bands; marks: lines with
            intervals.
        panels: from left to right; panels of the same quantity share their scale.
        better: which end of the scale is better.
    """

    name: str
    caption: str
    kind: Literal["points", "curves", "marks"]
    panels: tuple[Panel, ...]
    better: Literal["lower", "higher"]


def charts(frame: Frame) -> list[Chart]:
    """All non-empty plots."""
    if not frame.records:
        return []
    numeric = [factor for factor, values in frame.axes.items() if is_numeric(values)]
    found = [] if numeric else [_points(frame)]
    found += [_over(frame, factor) for factor in numeric]
    found += [_course(frame, "training_loss", "training loss", "nats per token", ("curve", "loss"))]
    if frame.ablation.metric not in MEASURES:
        metric = frame.ablation.metric
        found += [_course(frame, "held_out", metric, frame.ablation.measure.unit, ("evaluations", metric))]
    return [chart for chart in found if chart is not None and len(chart.panels) <= PANELS]


def is_numeric(values: Sequence[Name]) -> bool:
    """Whether a curve can be drawn over these values of a factor."""
    return len(values) > 1 and not any(isinstance(value, str) for value in values)


def _points(frame: Frame) -> Chart:
    """Every variant's mean, one panel per combination of factors, plus one for the paper's results."""
    ablation, panels = frame.ablation, []
    unit = ablation.heading
    samples = {variant: list(columns(values)) for variant, values in frame.values.items()}
    for i, at in enumerate(combinations(frame)):
        series = tuple(_point(frame, variant, some[i]) for variant, some in samples.items())
        panels.append(Panel(_at(at), series, "", unit))
    paper, caption = ablation.paper, f"{unit}: mean, 95 % interval and every seed; {ablation.measure.better} is better"
    if paper and paper.figures:
        whole = (-math.inf,), (math.inf,)
        figures = {variant: paper.figures.get(variant, math.nan) for variant in frame.values}
        series = tuple(Series(name, (0.0,), (figure,), *whole) for name, figure in figures.items())
        panels.append(Panel(f"paper: {paper.where}", series, "", paper.unit))
        caption += f"; on the right the paper's figures{f' ({paper.unit})' if paper.unit else ''}"
        caption += f", {paper.better} is better" if paper.better not in (None, ablation.measure.better) else ""
    return Chart("variants", caption + ".", "points", tuple(panels), ablation.measure.better)


def _point(frame: Frame, name: str, x_S: np.ndarray) -> Series:
    mean, low, high, diverged = _summary(frame, x_S)
    return Series(name, (0.0,), (mean,), (low,), (high,), tuple(complete(x_S).tolist()), (0.0,) if diverged else ())


def _over(frame: Frame, factor: str) -> Chart:
    """The metric over a factor: one line per variant, or, with further factors, one panel per variant and one line
    each."""
    axis = list(frame.axes).index(factor)
    x = tuple(map(float, frame.axes[factor]))
    others = [at for at in combinations(frame) if at[factor] == frame.axes[factor][0]]
    others = [{name: value for name, value in at.items() if name != factor} for at in others]
    lines: dict[str, list[tuple[str, np.ndarray]]] = {}
    for variant, values in frame.values.items():
        moved = np.moveaxis(values, axis + 1, -1).reshape(len(values), -1, len(x))  # [S, combination, x]
        for i, at in enumerate(others):
            panel, name = (variant, _at(at)) if at else ("", variant)
            lines.setdefault(panel, []).append((name, moved[:, i]))
    unit, log = frame.ablation.heading, spans_a_decade(x)
    panels = tuple(
        Panel(title, tuple(_line(frame, name, x, y_SX) for name, y_SX in some), factor, unit, log)
        for title, some in lines.items()
    )
    caption = f"{unit} over {factor}: mean and 95 % interval; {frame.ablation.measure.better} is better"
    if any(series.diverged for panel in panels for series in panel.series):
        caption += "; × at the edge: runs diverged there"
    return Chart(f"over_{factor}".replace(" ", "_"), caption + ".", "marks", panels, frame.ablation.measure.better)


def _line(frame: Frame, name: str, x: tuple[float, ...], y_SX: np.ndarray) -> Series:
    order = np.argsort(x)
    summaries = [_summary(frame, y_SX[:, i]) for i in order]
    x = tuple(x[i] for i in order)
    y, low, high, diverged = zip(*summaries, strict=True)
    return Series(name, x, y, low, high, (), tuple(at for at, gone in zip(x, diverged, strict=True) if gone))


def _course(frame: Frame, name: str, what: str, unit: str, where: tuple[str, str]) -> Chart | None:
    """A measure over the budgeted quantity, with every variant at its best point. None with fewer than two points."""
    by = frame.ablation.budget.by
    along, key = {"tokens": ("tokens", "tokens"), "flops": ("FLOPs", "flops")}.get(by, ("steps", "steps"))
    series = []
    for variant in frame.values:
        at = best_place(frame, variant)
        lines = [line for line in frame.records if line["variant"] == variant and line["at"] == at]
        made = _band(variant, lines, where, key) if lines else None
        series += [made] if made else []
    if not series:
        return None
    panel = Panel("", tuple(series), along, f"{what} ({unit})" if unit else what)
    caption = f"{what} over {along}: mean and 95 % interval over seeds"
    caption += ", each variant at its best point" if frame.ablation.over else ""
    better = frame.ablation.measure.better if where[0] == "evaluations" else "lower"
    return Chart(name, caption + ".", "curves", (panel,), better)


def _band(name: str, lines: list[dict[str, Any]], where: tuple[str, str], key: str) -> Series | None:
    values: dict[int, list[float]] = {}
    for line in lines:
        curve = line.get(where[0]) or {}
        for step, value in zip(curve.get("step", ()), curve.get(where[1], ()), strict=False):
            values.setdefault(step, []).append(math.nan if value is None else value)
    steps = [step for step in sorted(values) if np.isfinite(values[step]).any()]
    if len(steps) < 2:
        return None
    most = max(lines, key=lambda line: line["steps"])
    intervals = [interval_t(np.array(values[step])) for step in steps]
    return Series(
        name,
        tuple(step * most[key] / most["steps"] for step in steps),
        tuple(float(np.nanmean(values[step])) for step in steps),
        *zip(*intervals, strict=True),
        diverged=tuple(steps[-1:]) * any(line["diverged"] for line in lines),
    )


def _summary(frame: Frame, x_S: np.ndarray) -> tuple[float, float, float, bool]:
    """(mean, low, high, whether runs diverged); without a mean if any diverged."""
    x_S, bound = complete(x_S), frame.ablation.diverged
    if bound is not None and (x_S == bound).any():
        return math.nan, -math.inf, math.inf, True
    return float(x_S.mean()) if len(x_S) else math.nan, *interval_t(x_S), False


def spans_a_decade(x: Sequence[float]) -> bool:
    """Whether the values are positive and span a factor of ten."""
    return min(x) > 0 and max(x) >= 10 * min(x)


def _at(at: dict[str, Name]) -> str:
    return ", ".join(f"{factor} {value_text(value)}" for factor, value in at.items())


def texts(chart: Chart) -> Iterator[str]:
    """Everything that a plot shows, with six digits: equal for plots with equal content."""
    yield from (chart.name, chart.caption, chart.kind, chart.better)
    for panel in chart.panels:
        yield from (panel.title, panel.x_label, panel.y_label, str(panel.log_x))
        for series in panel.series:
            yield series.name
            for values in (series.x, series.y, series.low, series.high, series.seeds, series.diverged):
                yield " ".join(alone(value, 6) for value in values)
