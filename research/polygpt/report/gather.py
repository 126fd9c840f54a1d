"""Gathers the content of a report from a run folder. Missing parts are omitted, with a note."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from polygpt import spec
from polygpt.evaluation.evaluate import cut_answers
from polygpt.evaluation.likelihood import UNSCORED, predicts_text
from polygpt.evaluation.metric import Measure
from polygpt.report import samples
from polygpt.report.content import Chart, Content, Line
from polygpt.runtime import goodput

TITLES = {
    "loss": ("Training loss", "nats per token", True),
    "learning_rate": ("Learning rate", "", False),
    "gradient_norm": ("Gradient norm", "", True),
    "tokens_per_second": ("Speed", "tokens/s", True),
    "input_wait": ("Input wait", "share of a step", True),
}
"""Curves of training metrics in drawing order: title, unit, whether noisy."""
GAIN = "modality gain"


def content(run, results: Mapping[str, Any] | None) -> Content:
    """The content of a run's report.

    Args:
        run: an opened run.
        results: from `evaluate_run`, if the run was evaluated at this step.
    """
    folder = Path(run.workdir)
    metrics, timing = read_lines(folder / "metrics.jsonl"), read_lines(folder / "timing.jsonl")
    environment = read_json(folder / "environment.json")
    notes = []
    if not metrics:
        notes.append("The run folder has no training metrics.")
    if results is None:
        results = last_evaluation(metrics, int(run.step))
        where = f"the held-out results are of step {results['step']:,}" if results else "there are no held-out results"
        notes.append(f"Step {int(run.step):,} was not evaluated, {where}: polygpt evaluate {folder}")
    notes += [f"{task} was not measured in full: {fault}" for task, fault in (results or {}).get("faults", {}).items()]
    notes += [] if predicts_text(run.model.spec) else [f"{UNSCORED[0].upper()}{UNSCORED[1:]}."]
    notes += cut_answers((results or {}).get("tasks", {}))
    if changed := (results or {}).get("overrides"):
        words = " ".join(f"--{name} {text}" for name, text in changed.items())
        notes.append(f"The held-out results were measured with {words}.")
    training = [line for line in metrics if "evaluation" not in line]
    last = training[-1] if training else {}
    if skipped := last.get("skipped"):
        notes.append(f"{skipped:,.0f} updates were skipped: they were not finite, or the loss spiked.")
    if spikes := last.get("spikes"):
        times = last.get("rewinds", 0)
        notes.append(f"The loss spiked {spikes:,.0f} times; the run rewound to a checkpoint {times:,.0f} times.")
    drawn, sample_notes = samples.gather(run)
    measures = run.experiment.evaluation.measures()
    gains = (results or {}).get("modality_gain", {})
    steps = run.experiment.train.steps
    if run.step < steps:
        notes.append(f"At step {int(run.step):,} of {steps:,}.")
    return Content(
        title=run.experiment.name,
        facts=facts(run, timing, environment),
        tasks=(results or {}).get("tasks", {}),
        measures=measures,
        modalities=(results or {}).get("modalities", {}),
        gains={n: g for n, g in gains.items() if all(_finite(g.get(key)) for key in ("gain", "low", "high"))},
        charts=charts(metrics, timing, measures),
        time=goodput.summary(goodput.read(folder / "goodput.jsonl")),
        samples=drawn,
        config=spec.to_json(run.experiment),
        environment=environment,
        notes=(*notes, *sample_notes),
    )


def last_evaluation(metrics: list[dict], step: int) -> dict | None:
    """The latest evaluation results in the metrics up to a step, with their step."""
    found = [line for line in metrics if "evaluation" in line and line["step"] <= step]
    if not found:
        return None
    others = {name: found[-1].get(name, {}) for name in ("modalities", "modality_gain")}
    return {"step": found[-1]["step"], "tasks": found[-1]["evaluation"], **others}


def facts(run, timing: list[dict], environment) -> tuple[tuple[str, str], ...]:
    """The facts in the page header."""
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(run.params))
    found = [("step", f"{int(run.step):,} of {run.experiment.train.steps:,}"), ("parameters", f"{parameters:,}")]
    adapters = ", ".join(["text", *run.model.spec.adapters])
    found.append(("reads", adapters))
    if speeds := [line["tokens_per_second"] for line in timing if _finite(line.get("tokens_per_second"))]:
        found.append(("median speed", f"{np.median(speeds):,.0f} tokens/s"))
    if isinstance(environment, Mapping):
        found += [(name, str(environment[name])) for name in ("device", "jax") if environment.get(name)]
    found.append(("written", datetime.datetime.now().strftime("%Y-%m-%d %H:%M")))
    return tuple(found)


def charts(metrics: list[dict], timing: list[dict], measures: Mapping[str, Measure]) -> tuple[Chart, ...]:
    """The curves: training loss, brief held-out measures by task, then other training metrics and timing."""
    training = _series([line for line in metrics if "evaluation" not in line]) | _series(timing)
    held_out: dict[str, list[Line]] = {}
    for (measure, task), points in _series([_held_out(line) for line in metrics if "evaluation" in line]).items():
        held_out.setdefault(measure, []).append(Line(task, *points))
    drawn = {
        name: Chart(title, (Line(title.lower(), *training[name]),), unit, noisy)
        for name, (title, unit, noisy) in TITLES.items()
        if name in training
    }
    shown = {name: (one.title, one.unit) for name, one in measures.items() if one.brief}
    evaluated = [
        Chart(f"Held-out {title}", tuple(held_out[name]), unit)
        for name, (title, unit) in {**shown, GAIN: (GAIN, "nats per token")}.items()
        if name in held_out
    ]
    first = [drawn.pop("loss")] if "loss" in drawn else []
    objectives = tuple(Line(n.removeprefix("loss/"), *training[n]) for n in training if n.startswith("loss/"))
    if len(objectives) > 1:
        first.append(Chart("Objectives", objectives, "before weighting", noisy=True))
    return tuple(first + evaluated + list(drawn.values()))


def _held_out(line: dict) -> dict[Any, Any]:
    """The values in an evaluation line by (measure, task), and its step."""
    figures = {(name, task): value for task, measures in line["evaluation"].items() for name, value in measures.items()}
    gains = {(GAIN, name): gain["gain"] for name, gain in line.get("modality_gain", {}).items()}
    return {"step": line["step"], **figures, **gains}


def _series(lines: list[dict]) -> dict[Any, tuple[tuple[float, ...], tuple[float, ...]]]:
    """{name: (steps, values)}; for repeated steps the last line counts."""
    columns: dict[Any, dict[float, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and (_finite(value) or value is None):
                columns.setdefault(name, {})[line["step"]] = float("nan") if value is None else float(value)
    ordered = {name: sorted(column.items()) for name, column in columns.items()}
    return {name: tuple(zip(*pairs, strict=True)) for name, pairs in ordered.items()}


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def read_lines(path: Path) -> list[dict]:
    """The objects with a step in a JSON Lines file; [] without a file. Ignores a truncated line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(data, dict) and _finite(data.get("step")):
            found.append(data)
    return found


def read_json(path: Path) -> Any:
    """The data of a JSON file; None if missing or truncated."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
