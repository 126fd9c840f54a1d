"""The report as one HTML file that asks nothing of the network: styles, scripts, pictures and sound are inside."""

import base64
import json
from collections.abc import Mapping
from html import escape
from importlib import resources

import numpy as np

from polygpt.evaluation.metric import Measure
from polygpt.report import charts
from polygpt.report.content import Content, Item, Sample, Word
from polygpt.runtime.goodput import duration

COUNTS = {"n": "examples", "skipped": "skipped"}
"""Headings of the columns that count examples; they come last."""

# Nothing may be fetched: the browser itself refuses.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(content: Content) -> str:
    """The page."""
    results = _results(content.tasks, content.measures, "task")
    results += _results(content.modalities, content.measures, "all tasks, examples with")
    sections = [
        ("results", "Held-out results", results),
        ("gain", "Does it look and listen?", _gains(content.gains)),
        ("curves", "Training", _curves(content)),
        ("time", "Where the time went", _time(content.time)),
        ("samples", "Held-out samples", _samples(content.samples)),
        ("details", "How to repeat it", _details(content)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    bodies = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(title)}</h2>{body}</section>'
        for name, title, body in sections
    )
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in content.facts)
    notes = "".join(f"<li>{escape(note)}</li>" for note in content.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(content.title)} · polygpt</title><style>{_asset('report.css')}</style>"
        "</head><body><header><div><p class='brand'>polygpt</p>"
        f"<h1>{escape(content.title)}</h1></div><button id='theme' type='button' hidden>light / dark</button>"
        f"<dl class='facts'>{facts}</dl>{_tiles(content)}<nav aria-label='sections'>{links}</nav></header><main>"
        + (f"<ul class='notes' role='note'>{notes}</ul>" if notes else "")
        + f"{bodies}</main><script>{_asset('report.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("polygpt.report").joinpath("assets", name).read_text(encoding="utf-8")


def _tiles(content: Content) -> str:
    """Of each task the first share that its answers are measured by, in large type."""
    shares = [name for name, one in content.measures.items() if one.share and one.needs == "answers"]
    tiles = []
    for task, figures in content.tasks.items():
        name = next((name for name in shares if _known(figures.get(name))), None)
        if name:
            title = escape(content.measures[name].title)
            tiles.append(f"<div><b>{figures[name]:.1%}</b><span>{escape(task)}<br>{title}</span></div>")
    return f"<div class='tiles'>{''.join(tiles)}</div>" if tiles else ""


def _known(value) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _results(groups: Mapping, measures: Mapping[str, Measure], what: str) -> str:
    names = {name for figures in groups.values() for name in figures}
    columns = [name for name in measures if name in names] + sorted(names - set(measures) - set(COUNTS))
    columns += [name for name in COUNTS if name in names]
    if not columns:
        return ""
    shown = {name: measures.get(name, Measure(name, None, COUNTS.get(name, ""))) for name in columns}
    head = "".join(f'<th scope="col">{escape(one.title)}</th>' for one in shown.values())
    rows = "".join(
        f'<tr><th scope="row">{escape(group)}</th>'
        f"{''.join(_cell(one, figures.get(name)) for name, one in shown.items())}</tr>"
        for group, figures in groups.items()
    )
    return (
        f"<div class='scroll'><table class='results'><thead><tr><th scope='col'>{escape(what)}</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(measure: Measure, value) -> str:
    if not _known(value):
        return '<td class="number soft">–</td>'
    if measure.share:
        return f'<td class="number bar" style="--share:{min(max(value, 0), 1):.4f}">{value:.1%}</td>'
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 1000 else charts.figure(value)
    return f'<td class="number">{text}</td>'


def _gains(gains: Mapping) -> str:
    if not gains:
        return ""
    return (
        "<p>Each medium is exchanged for that of another row, and nothing else changes. The modality gain is by how "
        "much the held-out loss rises: above zero, the model uses what it sees and hears. Bars are 95&nbsp;% bootstrap "
        "intervals, in nats per token.</p><div class='scroll'><table class='gains'><thead><tr><th scope='col'>task / "
        "modality</th><th scope='col'><span class='hidden'>drawn</span></th><th scope='col'>gain</th><th scope='col'>"
        f"95&nbsp;% interval</th></tr></thead><tbody>{charts.intervals(gains)}</tbody></table></div>"
    )


def _curves(content: Content) -> str:
    drawn = "".join(charts.chart(chart) for chart in content.charts)
    return f"<div class='charts'>{drawn}</div>" if drawn else ""


def _time(seconds: Mapping[str, float]) -> str:
    whole = sum(seconds.values())
    if not whole:
        return ""
    return (
        f"<p>Goodput is {seconds['productive'] / whole:.1%}: the share of {duration(whole)}, from the first start to "
        "the end, in which steps were taken that were kept. Lost is what was done again after a restart or a rewind, "
        "or was under way when a process was killed; down is the time from one process's end to the beginning of the "
        "next.</p><div class='scroll'>"
        f"{charts.shares(seconds)}<table class='times'><tbody>"
        + "".join(
            f'<tr><th scope="row" class="time {name}">{escape(name.replace("_", " "))}</th>'
            f'<td class="number">{duration(value)}</td><td class="number">{value / whole:.1%}</td></tr>'
            for name, value in seconds.items()
            if value
        )
        + "</tbody></table></div>"
    )


def _samples(samples: Mapping[str, tuple[Sample, ...]]) -> str:
    parts = []
    if any(
        isinstance(p, Item) and p.attention_LWP is not None for ss in samples.values() for s in ss for p in s.prompt
    ):
        parts.append(
            "<p>Beside each medium: what the model attended to while it wrote a word. Choose another word of the "
            "answer, or a layer. Attention is averaged over heads, and scaled so that the most attended place of a "
            "medium is full; the percentage is the share of all attention that goes to the medium.</p>"
        )
    for task, some in samples.items():
        judged = [sample.right for sample in some if sample.right is not None]
        count = f" <small>{sum(judged)} of {len(judged)} right</small>" if judged else ""
        cards = "".join(_sample(sample) for sample in some)
        wide = " wide" if not any(isinstance(part, Item) for sample in some for part in sample.prompt) else ""
        parts.append(f"<h3>{escape(task)}{count}</h3><div class='samples{wide}'>{cards}</div>")
    return "".join(parts) if samples else ""


def _sample(sample: Sample) -> str:
    attended = [part for part in sample.prompt if isinstance(part, Item) and part.attention_LWP is not None]
    layers = np.flatnonzero(~np.isnan(attended[0].attention_LWP).all(axis=(1, 2))) if attended else ()
    prompt = "".join(
        f"<span class='said'>{escape(part)}</span>" if isinstance(part, str) else _item(part) for part in sample.prompt
    )
    mark = {True: "<b class='mark right'>✓ right</b>", False: "<b class='mark wrong'>✗ wrong</b>", None: ""}[
        sample.right
    ]
    words = " ".join(_word(word, i, bool(attended)) for i, word in enumerate(sample.words)) or "<i>nothing</i>"
    chooser = ""
    if attended:
        options = "".join(f'<option value="{i}">layer {i + 1}</option>' for i in layers)
        options = f"<option value='mean'>all layers</option>{options}"
        chooser = f"<label class='layer'>attention: <select>{options}</select></label>"
    truth = f"<div><dt>truth</dt><dd class='truth'>{escape(sample.truth)}</dd></div>" if sample.truth else ""
    return (
        f"<article class='sample' title='{escape(sample.place)}'><div class='prompt'>{prompt}</div>"
        f"<dl><div><dt>model</dt><dd class='answer'>{words} {mark}</dd></div>{truth}</dl>{chooser}</article>"
    )


def _word(word: Word, number: int, attended: bool) -> str:
    kind = {True: "right", False: "wrong", None: "free"}[word.right]
    if not attended:
        return f"<span class='word {kind}'>{escape(word.text)}</span>"
    pressed = "true" if number == 0 else "false"
    return f"<button type='button' class='word {kind}' aria-pressed='{pressed}'>{escape(word.text)}</button>"


def _with_mean(attention_LWP: np.ndarray) -> np.ndarray:
    """[1 + L, W, P]: the mean of the layers that have weights first; zeros in those that have none."""
    return np.nan_to_num(np.concatenate([np.nanmean(attention_LWP, axis=0, keepdims=True), attention_LWP]))


def _item(item: Item) -> str:
    width, height = item.size
    # Whole multiples keep a small picture's pixels square and equal; a spectrogram may stretch.
    scale = max(1, round(136 / max(width, height))) if item.wav is None else 1
    shown = (width * scale, height * scale) if item.wav is None else (min(306, max(160, 3 * width)), 96)
    while item.wav is None and max(shown) > 320:
        shown = (shown[0] // 2, shown[1] // 2)
    kind = "sound" if item.wav is not None else "picture"
    about = f"{item.modality} of the prompt" + (f", {item.seconds:.1f} seconds" if item.seconds else "")
    style = f"width:{shown[0]}px;height:{shown[1]}px"
    image = f"<img src='{_uri('image/png', item.png)}' alt='{escape(about)}' style='{style}'>"
    map_, data, share = "", "", ""
    if item.attention_LWP is not None:
        rows, columns = item.grid
        weights = _with_mean(item.attention_LWP)
        filled = weights.shape[-1]
        relative = weights / np.maximum(weights.max(axis=-1, keepdims=True), 1e-9)
        packed = {
            "words": weights.shape[1],
            "cells": filled,
            "map": base64.b64encode(np.rint(relative * 255).astype(np.uint8).tobytes()).decode(),
            "share": np.round(weights.sum(axis=-1), 4).ravel().tolist(),
        }
        data = f' data-attention="{escape(json.dumps(packed, separators=(",", ":")))}"'
        cells = "".join(f"<i style='--a:{a:.3f}'></i>" for a in relative[0, 0, : rows * columns])
        grid = f"grid-template:repeat({rows},1fr)/repeat({columns},1fr)"
        if item.wav is None:
            map_ = (
                f"<div class='spot' style='{style}'>{image.replace(escape(about), '')}<div class='map' style='{grid}'>"
            )
        else:
            map_ = f"<div class='strip' style='width:{shown[0]}px'><div class='map' style='{grid}'>"
        map_ += f"{cells}</div></div>"
        share = f"<output>{weights[0, 0].sum():.0%} of attention</output>"
    player = ""
    if item.wav is not None:
        source = _uri("audio/wav", item.wav)
        player = f"<audio controls preload='metadata' src='{source}' aria-label='{escape(about)}'></audio>"
    caption = f"<figcaption>{escape(item.modality)} {share}</figcaption>"
    return f"<figure class='item {kind}'{data}><div class='views'>{image}{map_}</div>{player}{caption}</figure>"


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _details(content: Content) -> str:
    return "".join(
        f"<details><summary>{title}</summary><pre tabindex='0'>{escape(json.dumps(data, indent=2))}</pre></details>"
        for title, data in (("Configuration", content.config), ("Environment", content.environment))
        if data
    )
