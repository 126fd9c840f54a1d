"""Evaluates a trained run and writes its report, both into the run folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from polygpt.evaluation.evaluate import Progress, evaluate
from polygpt.files import plain, write_atomically
from polygpt.report import gather, page

RESULTS = "evaluation.json"
"""File name of the held-out results in a run folder."""


def evaluate_run(
    run,
    progress: Progress | None = None,
    proceed: Callable[[], None] = lambda: None,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Evaluates a run on its held-out tasks and writes the results into its folder, unless it uses an adapter.

    If a task cannot be measured, the others still are. With several processes errors are raised instead, because they
    may have occurred in only one of them.

    Args:
        run: an opened run.
        progress: progress callback.
        proceed: called before each batch; a BaseException from it ends the evaluation without writing results. An
            `Exception` would be treated as an error of the task.
        overrides: changes to the run's experiment for this evaluation, as text by dotted name.

    Returns:
        The results of `evaluate` and the step: {"step": n, "tasks": ..., "modalities": ..., "modality_gain": ...}. Also
        "faults": {task: one line} and "overrides", if there are any.
    """
    experiment = run.experiment
    adapters, layout = run.model.spec.adapters, experiment.data.layout
    given = (run.model, run.params, run.tokenizer, adapters, layout, experiment.evaluation)
    faults = {} if jax.process_count() == 1 or run.model.layout is None else None
    found = evaluate(*given, progress=progress, proceed=proceed, faults=faults)
    more = {name: dict(value) for name, value in {"faults": faults, "overrides": overrides}.items() if value}
    results = {"step": int(run.step), **found, **more}
    if run.adapter is not None:
        return results | {"adapter": str(run.adapter)}
    _write(Path(run.workdir) / RESULTS, json.dumps(plain(results), indent=2, allow_nan=False) + "\n")
    return results


def write_report(run, place: str | Path | None = None) -> Path:
    """Writes a run's report to `place`, by default `report.html` in its folder; returns the path."""
    results = gather.read_json(Path(run.workdir) / RESULTS)
    if isinstance(results, Mapping) and results.get("step") != int(run.step):
        results = None  # of a different checkpoint
    place = Path(place) if place else Path(run.workdir) / "report.html"
    _write(place, page.render(gather.content(run, results)))
    return place


def _write(place: Path, text: str) -> None:
    """Writes a file in process 0 only."""
    if jax.process_index() == 0:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text)
