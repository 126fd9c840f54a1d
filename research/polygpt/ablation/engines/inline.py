"""The engine that works in this process, one task after the other."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from polygpt.ablation.engines.base import Engine, Failure, Task, Tell
from polygpt.ablation.engines.worker import work


@dataclasses.dataclass(frozen=True)
class Inline(Engine):
    """Works in this process. An error ends only the task in which it occurs."""

    def run(self, tasks: Sequence[Task], tell: Tell) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        for task in tasks:
            try:
                done = json.loads(work(task.to_json(), tell))
            except Exception as error:
                done = Failure.of(error)
            yield task, done
