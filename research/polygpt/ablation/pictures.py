"""Renders the plots of an ablation: SVG, or PNG if smaller. Equal content gives equal bytes."""

import functools
import hashlib
import io
import math
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polygpt.ablation.charts import Chart, Panel, Series, texts

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colour-blind-safe palette, without yellow, which is faint on white."""
MARKS, DASHES = "osD^vPX", ("-", "--", ":")
STYLE = 1
"""Raise this when the drawing changes: it marks existing plots as stale."""
LARGE = 60_000
"""Size of an SVG, in bytes, above which a PNG is tried too."""
WIDE = 4
"""Maximum number of panels side by side."""
TICKS = 7
"""Maximum number of factor values that each get a tick label."""
_MARK = "content "
_SETTINGS = {
    "svg.hashsalt": "polygpt",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "savefig.facecolor": "white",
}


def draw(chart: Chart) -> tuple[str, bytes]:
    """(suffix, content) of the plot's file."""
    with matplotlib.rc_context(), matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS, "backend": "agg"}):
        drawn = _figure(chart)
        svg = _saved(drawn, "svg", chart)
        if len(svg) <= LARGE:
            return ".svg", svg
        png = _saved(_figure(chart), "png", chart)
    return (".png", png) if len(png) < len(svg) else (".svg", svg)


def fingerprint(chart: Chart) -> str:
    """Hash of a plot's content, which is written into the file."""
    content = "\n".join([str(STYLE), *texts(chart)])
    return _MARK + hashlib.sha256(content.encode()).hexdigest()[:32]


def fingerprint_of(picture: bytes) -> str | None:
    """The `fingerprint` stored in a file; None if it was not written by `draw`."""
    found = re.search(rb"content [0-9a-f]{32}", picture)
    return found and found[0].decode()


def _saved(figure: Figure, kind: str, chart: Chart) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Description": fingerprint(chart), **({"Date": None} if kind == "svg" else {"Software": None})}
    figure.savefig(buffer, format=kind, dpi=100, metadata=metadata)
    return buffer.getvalue()


def _figure(chart: Chart) -> Figure:
    tallest = max(len(panel.series) for panel in chart.panels)
    n = len(chart.panels)
    columns = min(n, WIDE)
    lines = math.ceil(n / columns)
    width, height = (3.2, 0.7 + 0.32 * tallest) if chart.kind == "points" else (4.2 if n > 1 else 6.4, 3.2)
    figure = Figure(figsize=(min(width * columns + 1.2, 13), height * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    drawer = {"points": _points, "curves": functools.partial(_curves, chart), "marks": functools.partial(_marks, chart)}
    for i, (panel, one) in enumerate(zip(chart.panels, axes, strict=False)):
        drawer[chart.kind](one, panel)
        one.set_title(panel.title, fontsize=9)
        if chart.kind == "points" and i % columns:
            one.tick_params(labelleft=False)
        elif i % columns:
            one.set_ylabel("")
    for one in axes[n:]:
        one.set_axis_off()
    if chart.kind != "points":
        _share_scale(chart, axes[:n])
        if tallest > 1:
            place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if tallest > 4 else {"loc": "best"}
            axes[columns - 1].legend(fontsize=8, frameon=False, **place)
    return figure


def _points(axes: Axes, panel: Panel) -> None:
    """One line per variant: every seed, the mean and its interval."""
    for i, series in enumerate(panel.series):
        axes.plot(series.seeds, [i] * len(series.seeds), "o", color=_colour(i), alpha=0.35, markersize=3.5, zorder=2)
        (mean,), (low,), (high,) = series.y, series.low, series.high
        if not math.isfinite(mean):
            text = "diverged" if series.diverged else "–"
            axes.text(0.5, i, text, transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=8)
            continue
        if math.isfinite(low):
            axes.plot([low, high], [i, i], "-", color=_colour(i), linewidth=1.8, zorder=3)
        axes.plot([mean], [i], MARKS[i % len(MARKS)], color=_colour(i), markersize=6, zorder=4)
    axes.set_yticks(range(len(panel.series)), [series.name for series in panel.series])
    axes.set_ylim(len(panel.series) - 0.5, -0.5)
    axes.set_xlabel(panel.y_label)
    axes.locator_params(axis="x", nbins=5)


def _curves(chart: Chart, axes: Axes, panel: Panel) -> None:
    for i, series in enumerate(panel.series):
        axes.plot(series.x, series.y, _dash(i), color=_colour(i), linewidth=1.4, label=series.name)
        _band(axes, i, series)
        if series.diverged:
            _crosses(axes, i, series, chart.better)
    _label(axes, panel)


def _marks(chart: Chart, axes: Axes, panel: Panel) -> None:
    for i, series in enumerate(panel.series):
        kept = [at for at, y in enumerate(series.y) if math.isfinite(y)]
        x, y = ([values[at] for at in kept] for values in (series.x, series.y))
        halves = [(series.high[at] - series.low[at]) / 2 for at in kept]
        halves = [half if math.isfinite(half) else 0.0 for half in halves]
        style = MARKS[i % len(MARKS)] + _dash(i)
        axes.errorbar(
            x, y, halves, fmt=style, color=_colour(i), markersize=4, linewidth=1.3, capsize=2, label=series.name
        )
        if series.diverged:
            _crosses(axes, i, series, chart.better)
    if panel.log_x:
        axes.set_xscale("log")
    at = sorted({x for series in panel.series for x in series.x})
    if len(at) <= TICKS:
        axes.set_xticks(at, [f"{x:g}" for x in at])
        axes.minorticks_off()
    _label(axes, panel)


def _band(axes: Axes, i: int, series: Series) -> None:
    known = [math.isfinite(low) for low in series.low]
    if any(known):
        axes.fill_between(series.x, series.low, series.high, where=known, color=_colour(i), alpha=0.18, linewidth=0)


def _crosses(axes: Axes, i: int, series: Series, better: str) -> None:
    """Marks diverged runs at the bad end of the scale, since their values mean nothing."""
    edge = 0.97 if better == "lower" else 0.03
    where = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(series.diverged, [edge] * len(series.diverged), "x", color=_colour(i), markersize=7, **where)


def _label(axes: Axes, panel: Panel) -> None:
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)


def _share_scale(chart: Chart, axes) -> None:
    """Uses one scale for all panels: that of the means and of curves without their steep start."""
    low, high = math.inf, -math.inf
    for panel in chart.panels:
        for series in panel.series:
            kept = [value for value in series.y if math.isfinite(value)]
            if chart.kind == "curves":
                kept = kept[len(kept) // 10 :]
            ends = [
                end
                for pair in zip(series.y, series.low, series.high, strict=True)
                for end in pair[1:]
                if math.isfinite(end) and chart.kind == "marks" and math.isfinite(pair[0])
            ]
            low, high = min([low, *kept, *ends]), max([high, *kept, *ends])
    if low < high:
        room = 0.06 * (high - low)
        for one in axes:
            one.set_ylim(low - room, high + room)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _dash(i: int) -> str:
    return DASHES[i // len(COLOURS) % len(DASHES)]
