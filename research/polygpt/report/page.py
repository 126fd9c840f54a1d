"""Renders the report as one self-contained HTML file with style sheet, script, images and audio.

The markup is in `assets/report.html`, an autoescaping Jinja template; this file prepares its data.
"""

import base64
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from polygpt.evaluation.likelihood import COUNTS
from polygpt.evaluation.metric import Measure
from polygpt.report import charts
from polygpt.report.content import Content, Item, Sample
from polygpt.runtime.goodput import duration

# Makes the browser block every network request.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(content: Content) -> str:
    """The page, without empty sections."""
    groups = ((content.tasks, "task"), (content.modalities, "all tasks, examples with"))
    shown = {
        "tables": [table for figures, what in groups if (table := _results(figures, content.measures, what))],
        "gains": charts.intervals(content.gains) if content.gains else "",
        "charts": "".join(charts.chart(chart) for chart in content.charts),
        "time": _time(content.time),
        "samples": [_group(task, some) for task, some in content.samples.items()],
        "details": [
            (title, json.dumps(data, indent=2))
            for title, data in (("Configuration", content.config), ("Environment", content.environment))
            if data
        ],
    }
    sections = [
        ("results", "Held-out results", shown["tables"]),
        ("gain", "Does it look and listen?", shown["gains"]),
        ("curves", "Training", shown["charts"]),
        ("time", "Where the time went", shown["time"]),
        ("samples", "Held-out samples", shown["samples"]),
        ("details", "How to reproduce it", shown["details"]),
    ]
    return _template().render(
        **shown,
        content=content,
        policy=POLICY,
        css=_asset("report.css"),
        js=_asset("report.js"),
        tiles=_tiles(content),
        sections=[(name, title) for name, title, data in sections if data],
        attended=any(card["maps"] for group in shown["samples"] for card in group["cards"]),
    )


@functools.cache
def _template() -> jinja2.Template:
    made = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return made.from_string(_asset("report.html"))


def _asset(name: str) -> str:
    return resources.files("polygpt.report").joinpath("assets", name).read_text(encoding="utf-8")


def _tiles(content: Content) -> list[tuple[str, str, str]]:
    """Headline values: for each task, the first measure of its answers that is a share, as value, task and title."""
    shares = [name for name, one in content.measures.items() if one.share and one.needs == "answers"]
    tiles = []
    for task, figures in content.tasks.items():
        name = next((name for name in shares if _known(figures.get(name))), None)
        if name:
            tiles.append((f"{figures[name]:.1%}", task, content.measures[name].title))
    return tiles


def _known(value) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _results(groups: Mapping, measures: Mapping[str, Measure], what: str) -> dict[str, Any] | None:
    """A table of measures by group; None if there are none."""
    names = {name for figures in groups.values() for name in figures}
    columns = [name for name in measures if name in names] + sorted(names - set(measures) - set(COUNTS))
    columns += [name for name in COUNTS if name in names]
    if not columns:
        return None
    shown = {name: measures.get(name, Measure(name, None, COUNTS.get(name, ""))) for name in columns}
    rows = [
        (group, [_cell(one, figures.get(name)) for name, one in shown.items()]) for group, figures in groups.items()
    ]
    return {"what": what, "titles": [one.title for one in shown.values()], "rows": rows}


def _cell(measure: Measure, value) -> dict[str, Any]:
    if not _known(value):
        return {"kind": "soft", "share": None, "text": "–"}
    if measure.share:
        return {"kind": "bar", "share": min(max(value, 0), 1), "text": f"{value:.1%}"}
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 1000 else charts.figure(value)
    return {"kind": "", "share": None, "text": text}


def _time(seconds: Mapping[str, float]) -> dict[str, Any] | None:
    """Breakdown of the wall time; None if unknown."""
    whole = sum(seconds.values())
    if not whole:
        return None
    rows = [
        (name, name.replace("_", " "), duration(value), f"{value / whole:.1%}")
        for name, value in seconds.items()
        if value
    ]
    goodput = f"{seconds['productive'] / whole:.1%}"
    return {"goodput": goodput, "whole": duration(whole), "bar": charts.shares(seconds), "rows": rows}


def _group(task: str, samples: tuple[Sample, ...]) -> dict[str, Any]:
    """The samples of a task."""
    judged = [sample.right for sample in samples if sample.right is not None]
    wide = not any(isinstance(part, Item) for sample in samples for part in sample.prompt)
    cards = [_card(sample) for sample in samples]
    return {"task": task, "right": sum(judged), "judged": len(judged), "wide": wide, "cards": cards}


def _card(sample: Sample) -> dict[str, Any]:
    """A sample; `maps` are numbers and names of attention maps, see `_rows`."""
    attended = [part for part in sample.prompt if isinstance(part, Item) and part.attention]
    kinds = {True: "right", False: "wrong", None: "free"}
    return {
        "place": sample.place,
        "prompt": [part if isinstance(part, str) else _item(part) for part in sample.prompt],
        "words": [{"text": word.text, "kind": kinds[word.right]} for word in sample.words],
        "right": sample.right,
        "truth": sample.truth,
        "maps": _names(attended[0].attention) if attended else [],
    }


def _rows(attention: Mapping[str, np.ndarray]) -> np.ndarray:
    """[M, W, P]: of each kind the mean of the layers with weights, then the layers; zeros in those without."""
    rows = [row for one_LWP in attention.values() for row in (np.nanmean(one_LWP, axis=0, keepdims=True), one_LWP)]
    return np.nan_to_num(np.concatenate(rows))


def _names(attention: Mapping[str, np.ndarray]) -> list[tuple[int, str]]:
    """The numbers in `_rows` and the names of the means and of the layers with weights."""
    found, first = [], 0
    for kind, one_LWP in attention.items():
        of = f"{kind}, " if len(attention) > 1 else ""
        layers = np.flatnonzero(~np.isnan(one_LWP).all(axis=(1, 2))).tolist()
        found += [(first, f"{of}all layers"), *((first + 1 + layer, f"{of}layer {layer + 1}") for layer in layers)]
        first += 1 + len(one_LWP)
    return found


def _item(item: Item) -> dict[str, Any]:
    """A media item of a prompt, with its attention map if available."""
    width, height = item.size
    # Small images are enlarged by integer factors, so that pixels stay square and equal; spectrograms may stretch.
    scale = max(1, round(136 / max(width, height))) if item.wav is None else 1
    shown = (width * scale, height * scale) if item.wav is None else (min(306, max(160, 3 * width)), 96)
    while item.wav is None and max(shown) > 320:
        shown = (shown[0] // 2, shown[1] // 2)
    found = {
        "kind": "sound" if item.wav is not None else "picture",
        "modality": item.modality,
        "about": f"{item.modality} of the prompt" + (f", {item.seconds:.1f} seconds" if item.seconds else ""),
        "image": _uri("image/png", item.png),
        "player": _uri("audio/wav", item.wav) if item.wav is not None else "",
        "style": f"width:{shown[0]}px;height:{shown[1]}px",
        "packed": "",
    }
    if not item.attention:
        return found
    rows, columns = item.grid
    weights = _rows(item.attention)
    relative = weights / np.maximum(weights.max(axis=-1, keepdims=True), 1e-9)
    packed = {
        "words": weights.shape[1],
        "cells": weights.shape[-1],
        "map": base64.b64encode(np.rint(relative * 255).astype(np.uint8).tobytes()).decode(),
        "share": np.round(weights.sum(axis=-1), 4).ravel().tolist(),
    }
    return found | {
        "packed": json.dumps(packed, separators=(",", ":")),
        "shades": [f"{shade:.3f}" for shade in relative[0, 0, : rows * columns]],
        "grid": f"grid-template:repeat({rows},1fr)/repeat({columns},1fr)",
        "strip": f"width:{shown[0]}px",
        "seen": f"{weights[0, 0].sum():.0%}",
    }


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
