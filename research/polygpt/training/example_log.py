"""Logs which examples each step was trained on, if `data.log_examples` is set."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from polygpt.runtime import processes
from polygpt.training.loggers import Silent, truncate
from polygpt.training.parallel import Parallel


def example_log(workdir: Path, parallel: Parallel, step: int) -> "ExampleLog | None":
    """The log of this process's data shard; None if another process of that shard writes it. Collective: all processes
    must call it."""
    data_shards = processes.gather("data_shards", str(parallel.data_shard))
    if data_shards.index(str(parallel.data_shard)) != jax.process_index():
        return None
    return ExampleLog(workdir, parallel.data_shard, parallel.data_shards, step)


class ExampleLog(Silent):
    """`examples-<data_shard>.jsonl` in the run folder, one file per data shard; together they name every example.

    Lines: {"step": 10, "examples": [["task", position in the task's stream, index of the example], ...]}.

    Args:
        workdir: the run folder.
        data_shard, data_shards: index of this data shard and their number. One process of each writes.
        step: the run continues after this step; later lines from an interrupted run are removed (by data shard 0 for
            shards that no longer exist).
    """

    def __init__(self, workdir: Path, data_shard: int, data_shards: int, step: int):
        self._path = workdir / f"examples-{data_shard}.jsonl"
        if data_shard == 0:
            for path in workdir.glob("examples-*.jsonl"):
                number = re.fullmatch(r"examples-(\d+)\.jsonl", path.name)
                if number and int(number[1]) >= data_shards:
                    truncate(path, step)
        self._open(step)

    def examples(self, step: int, examples: Sequence[tuple[str, int, int]]) -> None:
        """Logs the examples of a finished step."""
        self._file.write(json.dumps({"step": step, "examples": examples}) + "\n")

    def rewind(self, step, spike):
        self.close()
        self._open(step)

    def flush(self):
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self):
        self._file.close()

    def _open(self, step: int) -> None:
        truncate(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
