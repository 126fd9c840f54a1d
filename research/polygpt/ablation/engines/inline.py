"""The engine that runs tasks in this process, one after another."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from polygpt.ablation.engines.base import Callback, Engine, Failure, Task
from polygpt.ablation.engines.worker import work


@dataclasses.dataclass(frozen=True)
class Inline(Engine):
    """Runs tasks in this process. An error ends only the task in which it occurs."""

    def run(self, tasks: Sequence[Task], callback: Callback) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        for task in tasks:
            try:
                done = json.loads(work(task.to_json(), callback))
            except Exception as error:
                done = Failure.of(error)
            yield task, done
