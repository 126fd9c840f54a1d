"""Which examples each step was trained on, where `data.log_examples` asks for it."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from polygpt.runtime import processes
from polygpt.training.parallel import Parallel
from polygpt.training.sinks import Silent, truncate


def example_log(workdir: Path, parallel: Parallel, step: int) -> "ExampleLog | None":
    """The log of this process's feeder; None where another process of that feeder writes it. All processes call it."""
    feeders = processes.gather("feeders", str(parallel.feeder))
    if feeders.index(str(parallel.feeder)) != jax.process_index():
        return None
    return ExampleLog(workdir, parallel.feeder, parallel.feeders, step)


class ExampleLog(Silent):
    """`examples-<feeder>.jsonl` in the run folder, a file for each feeder: all of them together name every example.

    Lines: {"step": 10, "examples": [["task", position in the task's stream, number of the example], ...]}.

    Args:
        workdir: the run folder.
        feeder, feeders: which feeder this is, and of how many. One process of each writes.
        step: the run continues after this step: what later lines an interrupted run left are removed, those of feeders
            that are no more by feeder 0.
    """

    def __init__(self, workdir: Path, feeder: int, feeders: int, step: int):
        self._path = workdir / f"examples-{feeder}.jsonl"
        if feeder == 0:
            for path in workdir.glob("examples-*.jsonl"):
                number = re.fullmatch(r"examples-(\d+)\.jsonl", path.name)
                if number and int(number[1]) >= feeders:
                    truncate(path, step)
        self._open(step)

    def examples(self, step: int, examples: Sequence[tuple[str, int, int]]) -> None:
        """Every step, once it is done."""
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
