"""Plots of a search: history, metric by dimension, importance of dimensions, Pareto front."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polygpt.ablation.tune import Choice, Int, Search
from polygpt.ablation.tuning.summary import Summary

BLUE, PALE, RED, GREY = "#3566a8", "#7ba3d0", "#b03030", "#b8bdc6"
ACROSS = 3
"""Number of slice plots per row."""


def draw(summary: Summary, folder: Path) -> list[str]:
    """Draws all applicable plots; returns their file names."""
    made: dict[str, Callable[[Summary, Path], None]] = {}
    if any(trial["objectives"] for trial in summary.trials):
        made = {"history.png": history, "slices.png": slices}
        made |= {"importance.png": importance} if summary.importance else {}
        made |= {"front.png": front} if summary.search.against else {}
    for name, drawing in made.items():
        drawing(summary, folder / name)
    return list(made)


def history(summary: Summary, path: Path) -> None:
    """The metric of every trial, the best so far, and pruned trials; below, learning curves."""
    search, lower = summary.search, summary.search.direction == "lower"
    pruned = [trial["number"] for trial in summary.trials if trial["objectives"] is None]
    complete = [trial for trial in summary.trials if trial["objectives"]]
    numbers = [trial["number"] for trial in complete]
    metric = [trial["objectives"][search.metric] for trial in complete]
    curves = [trial for trial in summary.trials if len(trial["curve"]) > 1]
    figure = Figure(figsize=(9 if curves else 6, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    axes[0].scatter(numbers, metric, s=18, color=BLUE, label="complete", zorder=3)
    best = (np.minimum if lower else np.maximum).accumulate(metric)
    axes[0].step(numbers, best, where="post", color=RED, linewidth=1.2, label="best so far")
    for i, number in enumerate(pruned):
        axes[0].axvline(number, color=GREY, linewidth=0.8, label=None if i else f"pruned ({len(pruned)})", zorder=0)
    axes[0].set(xlabel="trial", ylabel=search.metric, title="trials")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=7, frameon=False)
    for trial in curves:
        done = trial["objectives"] is not None
        axes[1].plot(*zip(*trial["curve"], strict=True), color=BLUE if done else GREY, linewidth=0.9, alpha=0.8)
    if curves:
        axes[1].set(xlabel="% of the run", ylabel=search.metric, title="learning curves; grey: pruned")
    _bounded(axes[0], metric, search)
    figure.savefig(path, dpi=150)


def slices(summary: Summary, path: Path) -> None:
    """The metric against each dimension; later trials are darker."""
    search = summary.search
    complete = [trial for trial in summary.trials if trial["objectives"]]
    metric = [trial["objectives"][search.metric] for trial in complete]
    rows = math.ceil(len(search.dimensions) / ACROSS)
    across = min(ACROSS, len(search.dimensions))
    figure = Figure(figsize=(3.2 * across, 2.8 * rows), layout="constrained")
    every = figure.subplots(rows, across, squeeze=False, sharey=True).flatten()
    best = set(summary.best)
    for axes, (name, dimension) in zip(every, search.dimensions.items(), strict=False):
        x = _values(search, complete, name)
        shade = [trial["number"] for trial in complete]
        axes.scatter(
            x, metric, c=shade, cmap="Blues", vmin=-len(complete) / 2, s=20, edgecolors="#44546a", linewidths=0.3
        )
        chosen = [(a, b) for a, b, trial in zip(x, metric, complete, strict=True) if trial["number"] in best]
        axes.scatter(*zip(*chosen, strict=True), s=70, facecolors="none", edgecolors=RED)
        if isinstance(dimension, Choice):
            axes.set_xticks(range(len(dimension.names())), dimension.names(), rotation=30, ha="right", fontsize=7)
        elif dimension.log:
            axes.set_xscale("log")
        elif isinstance(dimension, Int):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(name, fontsize=8)
        _bounded(axes, metric, search)
    for axes in every[len(search.dimensions) :]:
        axes.set_axis_off()
    for axes in every[::across]:
        axes.set_ylabel(search.metric)
    figure.savefig(path, dpi=150)


def importance(summary: Summary, path: Path) -> None:
    """The importance of each dimension, by each evaluator."""
    first = next(iter(summary.importance.values()))
    names = sorted(summary.search.dimensions, key=lambda name: first.get(name, 0.0))
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(summary.importance)
    for i, (evaluator, shares) in enumerate(summary.importance.items()):
        y = np.arange(len(names)) + (0.5 - i) * height
        axes.barh(y, [shares.get(name, 0.0) for name in names], height, color=(BLUE, PALE)[i], label=evaluator)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlim=(0, 1), title="importance of each dimension")
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def front(summary: Summary, path: Path) -> None:
    """The metric against its cost, and the Pareto front."""
    search = summary.search
    points = [(t["objectives"][search.against], t["objectives"][search.metric], t["number"]) for t in summary.trials
              if t["objectives"]]  # fmt: skip
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=22, color=PALE, label="trials")
    chosen = sorted(point for point in points if point[2] in set(summary.best))
    axes.step([x for x, _, _ in chosen], [y for _, y, _ in chosen], where="post", color=RED, linewidth=1)
    axes.scatter([x for x, _, _ in chosen], [y for _, y, _ in chosen], s=34, color=RED, label="front", zorder=3)
    for x, y, number in chosen:
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    costs = [x for x, _, _ in points]
    if max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    axes.set(xlabel=search.against, ylabel=search.metric, title="Pareto front")
    axes.legend(fontsize=7, frameon=False)
    _bounded(axes, [y for _, y, _ in points], search)
    figure.savefig(path, dpi=150)


def _values(search: Search, trials: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """The value of a dimension for each trial: a number, or the index of its option."""
    dimension = search.dimensions[name]
    order = {option: i for i, option in enumerate(dimension.names())} if isinstance(dimension, Choice) else None
    return [order[trial["values"][name]] if order else trial["values"][name] for trial in trials]


def _bounded(axes: Axes, values: list[float], search: Search) -> None:
    """Limits the axis, so that much worse trials do not squeeze the others together."""
    sign = 1 if search.direction == "lower" else -1
    best, median, worst = np.quantile(sign * np.array(values), (0, 0.5, 1))
    spread = median - best
    if len(values) > 9 and worst - median > 5 * spread > 0:
        axes.set_ylim(*sorted((sign * (best - 0.3 * spread), sign * (median + 3 * spread))))
