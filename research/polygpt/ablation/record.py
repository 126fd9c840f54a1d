"""The record of a run: a line of results without the fields that identify the run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polygpt.ablation.budget import costs
from polygpt.ablation.measures import CACHE, TRAINING_LOSS, cache_bytes
from polygpt.ablation.provenance import made
from polygpt.evaluation.likelihood import COUNTS
from polygpt.files import plain
from polygpt.training.experiment import Experiment

POINTS = 60
"""Maximum number of points of a learning curve."""

Evaluations = Sequence[tuple[int, Mapping[str, Mapping[str, float]]]]
"""(step, measures by task) for each evaluation of a run."""


def record(
    experiment: Experiment,
    losses: np.ndarray,
    evaluations: Evaluations,
    *,
    stopped: bool,
    seconds: float,
    how: str,
) -> dict[str, Any]:
    """A line of results (see `results.py`) without key, variant, point and stage.

    Args:
        experiment: the experiment of the run.
        losses: one per step, from the first step; may be non-finite.
        evaluations: in order of steps.
        stopped: whether the run ended early because losses were not finite, or spiked.
        seconds: wall time.
        how: how it was run.
    """
    steps, each = len(losses), costs(experiment)
    last = evaluations[-1][1] if evaluations and evaluations[-1][0] == steps else {}
    metrics = _flat(last) | {TRAINING_LOSS: finite_mean(losses[-max(1, steps // 10) :]), CACHE: cache_bytes(experiment)}
    final = [value for name, value in metrics.items() if name.rpartition("/")[2] == "loss"]
    return plain(
        {
            "seed": experiment.seed,
            "metrics": metrics,
            "curve": _curve(losses),
            "evaluations": _course(evaluations),
            "parameters": each.parameters,
            "flops": steps * each.flops,
            "tokens": steps * each.positions,
            "steps": steps,
            "seconds": round(seconds, 3),
            "diverged": stopped or not all(map(math.isfinite, final)),
            "how": how,
            "made": made(experiment),
        }
    )


def finite_mean(losses: np.ndarray) -> float:
    """Mean of the finite losses, in float64; NaN if there are none. Steps with another loss made no update."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else math.nan


def _curve(losses: np.ndarray) -> dict[str, list]:
    """At most `POINTS` steps, each with the mean of the losses since the previous one."""
    edges = np.unique(np.linspace(0, len(losses), POINTS + 1).round().astype(int))
    means = [float(f"{finite_mean(losses[low:high]):.6g}") for low, high in zip(edges, edges[1:], strict=False)]
    return {"step": edges[1:].tolist(), "loss": means}


def _course(evaluations: Evaluations) -> dict[str, list]:
    """At most `POINTS` evaluations, the last among them."""
    kept = evaluations[:: -math.ceil(len(evaluations) / POINTS)][::-1] if evaluations else []
    flat = [_flat(tasks) for _, tasks in kept]
    names = dict.fromkeys(name for figures in flat for name in figures)
    return {"step": [step for step, _ in kept], **{name: [own.get(name) for own in flat] for name in names}}


def _flat(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {
        f"{task}/{measure}": value
        for task, measures in tasks.items()
        for measure, value in measures.items()
        if measure not in COUNTS
    }
