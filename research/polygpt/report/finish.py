"""What is done with a trained run: its held-out results and its report, both written into its folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from polygpt.evaluation.evaluate import Progress, evaluate
from polygpt.files import plain, write_atomically
from polygpt.report import gather, page

RESULTS = "evaluation.json"
"""Name of the file of held-out results in a run's folder."""


def evaluate_run(
    run,
    progress: Progress | None = None,
    proceed: Callable[[], None] = lambda: None,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Evaluates a run on its held-out tasks and writes the results into its folder.

    A task that cannot be measured takes no other's results away, unless several processes compute them together, of
    which one alone may have met the error: then it is raised.

    Args:
        run: an opened run.
        progress: told how far it is.
        proceed: called before each batch; what it raises ends the evaluation, and nothing is written. It must be no
            `Exception`, which would be taken for one of the task's.
        overrides: by dotted name, the text of what was changed in the run's experiment to evaluate it.

    Returns:
        What `evaluate` gives, and the step: {"step": n, "tasks": ..., "modalities": ..., "modality_gain": ...}. Where
        there are any, also "faults": {task: one line}, and "overrides".
    """
    experiment = run.experiment
    adapters, layout = run.model.spec.adapters, experiment.data.layout
    given = (run.model, run.params, run.tokenizer, adapters, layout, experiment.evaluation)
    faults = {} if jax.process_count() == 1 or run.model.layout is None else None
    found = evaluate(*given, progress=progress, proceed=proceed, faults=faults)
    more = {name: dict(value) for name, value in {"faults": faults, "overrides": overrides}.items() if value}
    results = {"step": int(run.step), **found, **more}
    _write(Path(run.workdir) / RESULTS, json.dumps(plain(results), indent=2, allow_nan=False) + "\n")
    return results


def write_report(run, place: str | Path | None = None) -> Path:
    """Writes a run's report, `report.html` in its folder unless `place` is given; returns where it is."""
    results = gather.read_json(Path(run.workdir) / RESULTS)
    if isinstance(results, Mapping) and results.get("step") != int(run.step):
        results = None  # of another checkpoint
    place = Path(place) if place else Path(run.workdir) / "report.html"
    _write(place, page.render(gather.content(run, results)))
    return place


def _write(place: Path, text: str) -> None:
    """Of several processes, which all compute it together, the first writes it."""
    if jax.process_index() == 0:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text)
