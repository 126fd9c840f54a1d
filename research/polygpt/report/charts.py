"""Charts as inline SVG: readable without scripts; the data for hovering is embedded as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from polygpt.report.content import Chart

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 28
POINTS = 400
"""Maximum number of points per curve; longer curves are averaged over neighbours."""


def figure(value: float) -> str:
    """Formats a number compactly."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 4, least: float = 0.0) -> list[float]:
    """About `count` round numbers in [low, high], multiples of `least` if given."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / count))
    found = []
    for step in (10 * power, 5 * power, 2.5 * power, 2 * power, power):
        if least and (step < least or step % least):
            continue
        found = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if len(found) >= count - 1:
            break
    return found


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: averages neighbours, ignoring missing values."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) <= POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), POINTS)
    measured = [y[group][np.isfinite(y[group])] for group in groups]
    return (
        np.array([x[group].mean() for group in groups]),
        np.array([part.mean() if len(part) else np.nan for part in measured]),
    )


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Moving average over `window` points, ignoring missing values, which stay missing themselves."""
    measured = np.isfinite(values)
    box = np.ones(min(2 * (window // 2) + 1, len(values)))
    total = np.convolve(np.where(measured, values, 0), box, "same")
    count = np.convolve(measured.astype(float), box, "same")
    return np.where(measured, total / np.maximum(count, 1), np.nan)


def chart(content: Chart) -> str:
    """A chart as an HTML figure; "" if it has no data."""
    lines = [(line.name, *thin(line.steps, line.values)) for line in content.lines]
    lines = [(name, x, y) for name, x, y in lines if np.isfinite(y).any()]
    if not lines:
        return ""
    every_y = np.concatenate([y[np.isfinite(y)] for _, _, y in lines])
    every_x = np.concatenate([x for _, x, _ in lines])
    low, high = _bounds(every_y, content.noisy)
    first, last = float(every_x.min()), float(every_x.max())
    if first == last:
        first, last = first - 0.5, last + 0.5

    def px(x):
        return LEFT + (np.asarray(x) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def py(y):
        return HEIGHT - BOTTOM - (np.asarray(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(low, high):
        y = float(py(tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{figure(tick)}</text>')
    for tick in ticks(first, last, least=1.0):
        x = float(px(tick))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{figure(tick)}</text>')
    points = []
    for i, (name, x, y) in enumerate(lines):
        shown = y
        if content.noisy and len(y) > 20:
            shown = smooth(y, len(y) // 30)
            parts.append(f'<path class="raw s{i % 6}" d="{_path(px(x), py(np.clip(y, low, high)))}"/>')
        parts.append(f'<path class="line s{i % 6}" d="{_path(px(x), py(np.clip(shown, low, high)))}"/>')
        if np.isfinite(shown).sum() == 1:
            at = int(np.flatnonzero(np.isfinite(shown))[0])
            parts.append(f'<circle class="dot s{i % 6}" cx="{px(x)[at]:.1f}" cy="{py(shown)[at]:.1f}" r="3"/>')
        points.append({"name": name, "x": _round(x), "y": _round(shown)})
    data = {"lines": points, "x": [first, last], "y": [low, high], "unit": content.unit}
    finals = [figure(float(line["y"][-1])) for line in points if line["y"][-1] is not None]
    label = f"{content.title}: {len(lines)} curve(s), steps {figure(first)} to {figure(last)}, last {', '.join(finals)}"
    legend = "".join(f'<li class="s{i % 6}">{escape(name)}</li>' for i, (name, _, _) in enumerate(lines))
    unit = f" <small>{escape(content.unit)}</small>" if content.unit else ""
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption>{escape(content.title)}{unit}<output></output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        + (f'<ul class="legend">{legend}</ul>' if len(lines) > 1 else "")
        + "</figure>"
    )


def _bounds(values: np.ndarray, noisy: bool) -> tuple[float, float]:
    """The range of the vertical axis; ignores rare spikes of noisy curves."""
    low, high = float(values.min()), float(values.max())
    if noisy and len(values) > 20:
        high = float(np.quantile(values, 0.995))
    if 0 <= low < 0.35 * high:
        low = 0.0
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - room), high + room


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path with gaps where y is not finite."""
    parts, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            parts.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _round(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def intervals(gains: Mapping[str, Mapping[str, float]]) -> str:
    """A forest plot as table rows: name, interval on a common axis with zero marked, values."""
    edges = [value for gain in gains.values() for value in (gain["low"], gain["high"])] + [0.0]
    low, high = min(edges), max(edges)
    low, high = low - (high - low) * 0.05 - 1e-9, high + (high - low) * 0.05 + 1e-9
    rows = []
    for name, gain in gains.items():
        zero, a, b, mid = ((v - low) / (high - low) * 300 for v in (0.0, gain["low"], gain["high"], gain["gain"]))
        sure = "sure" if gain["low"] > 0 else "unsure"
        text = f"{gain['gain']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        rows.append(
            f'<tr class="{sure}"><th scope="row">{escape(name)}</th><td class="forest">'
            f'<svg viewBox="0 0 300 22" preserveAspectRatio="none" role="img" aria-label="{escape(text)}">'
            f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="22"/>'
            f'<line class="span" x1="{a:.1f}" x2="{max(b, a + 1):.1f}" y1="11" y2="11"/>'
            f'<line class="mid" x1="{mid:.1f}" x2="{mid:.1f}" y1="5" y2="17"/></svg></td>'
            f'<td class="number">{gain["gain"]:+.3f}</td>'
            f'<td class="number soft">{gain["low"]:+.3f} to {gain["high"]:+.3f}</td></tr>'
        )
    return "".join(rows)


def shares(parts: Mapping[str, float]) -> str:
    """A stacked bar; each part has the CSS classes "time" and its name."""
    whole, left, drawn = sum(parts.values()), 0.0, []
    for name, value in parts.items():
        width = value / whole * 1000
        text = f"{name.replace('_', ' ')} {value / whole:.1%}"
        drawn.append(
            f'<rect class="time {escape(name)}" x="{left:.2f}" y="0" width="{width:.2f}" height="26">'
            f"<title>{escape(text)}</title></rect>"
        )
        left += width
    label = ", ".join(f"{name.replace('_', ' ')} {value / whole:.1%}" for name, value in parts.items() if value)
    return (
        f'<svg class="shares" viewBox="0 0 1000 26" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{''.join(drawn)}</svg>"
    )
