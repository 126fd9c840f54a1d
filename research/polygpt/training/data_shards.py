"""Agreement between processes on the data, and each one's position in it."""

import collections
import json
from collections.abc import Mapping
from typing import Any

import jax

from polygpt.errors import UserError
from polygpt.evaluation.spec import EvaluationSpec
from polygpt.runtime import processes


def require_same_data(train: Mapping[str, int], evaluation: EvaluationSpec) -> None:
    """Raises UserError in every process if the number of examples differs between processes.

    Args:
        train: number of examples per training task in this process.
        evaluation: the held-out tasks; their sources are opened if there are several processes.
    """
    if jax.process_count() == 1:
        return
    held_out = {name: len(task.source.open()) for name, task in evaluation.tasks.items()}
    here = {f"task {name!r}": count for name, count in train.items()}
    here |= {f"held-out task {name!r}": count for name, count in held_out.items()}
    first, *others = (json.loads(text) for text in processes.gather("examples", json.dumps(here)))
    for rank, counts in enumerate(others, 1):
        for task, count in first.items():
            if counts.get(task) != count:
                raise UserError(
                    f"{task} has {count} examples in process 0 and {counts.get(task)} in process {rank}: "
                    "all processes must see the same data"
                )


def gather_positions(place: dict[str, Any]) -> list[dict[str, Any]]:
    """Every process's position in the data, given this one's."""
    return [json.loads(text) for text in processes.gather("places in the data", json.dumps(place))]


def skipped(place: dict[str, Any]) -> dict[str, int]:
    """Records skipped by all data shards, by reason, given this process's position in the data."""
    by_shard = {place["data_shard"]: place["skipped"] for place in gather_positions(place)}
    return dict(sum(map(collections.Counter, by_shard.values()), collections.Counter()))
