"""The data as all processes of a run see it: the same everywhere, and where each stands in it."""

import collections
import json
from collections.abc import Mapping
from typing import Any

import jax

from polygpt.errors import UserError
from polygpt.evaluation.spec import EvaluationSpec
from polygpt.runtime import processes


def require_same_data(train: Mapping[str, int], evaluation: EvaluationSpec) -> None:
    """Raises UserError, in every process, if one has another number of examples than the first.

    Args:
        train: examples of each training task here.
        evaluation: what is held out; its sources are opened where there are several processes.
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
                    "let all processes see the same data"
                )


def everywhere(place: dict[str, Any]) -> list[dict[str, Any]]:
    """The places in the data of all processes, given this one's."""
    return [json.loads(text) for text in processes.gather("places in the data", json.dumps(place))]


def skipped(place: dict[str, Any]) -> dict[str, int]:
    """Records left out by all data shards, by reason, given this process's place in the data."""
    by_shard = {place["data_shard"]: place["skipped"] for place in everywhere(place)}
    return dict(sum(map(collections.Counter, by_shard.values()), collections.Counter()))
