"""TensorBoard event files."""

import importlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polygpt.training.loggers import Silent


def _without_torch(*names: str) -> list[Any]:
    """Modules of tensorboardX, imported as if PyTorch were not installed: it would load it, which takes seconds."""
    absent = sys.modules.setdefault("torch", None) is None  # importing it now raises ImportError
    try:
        return [importlib.import_module(f"tensorboardX.{name}") for name in names]
    finally:
        if absent:
            del sys.modules["torch"]


event_file_writer, event_pb2, summary = _without_torch("event_file_writer", "proto.event_pb2", "summary")

FLUSH_SECONDS = 30.0
"""Seconds between flushes."""
_files = itertools.count()


class TensorBoard(Silent):
    """Event files for TensorBoard under `tensorboard/` in the run folder.

    Written in the loop's thread. A full disk kills the writer thread of tensorboardX's `SummaryWriter`, and the next
    call blocks forever.
    """

    def __init__(self, workdir: Path, step: int):
        self._folder = workdir / "tensorboard"
        self._begin(step)

    def metrics(self, step, values):
        self._scalars("train", step, values)

    def timing(self, step, values):
        self._scalars("timing", step, values)

    def evaluation(self, step, results):
        self._scalars("evaluation", step, dict(scalars(results)))

    def rewind(self, step, spike):
        self.close()
        self._begin(step)

    def flush(self):
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self):
        self._writer.close()

    def _begin(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{next(_files)}")
        self._write(
            step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        )  # hides later steps of other files
        self.flush()

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=summary.scalar(f"{group}/{name}", value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **what))


def scalars(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a nested mapping with their names, joined by "/"."""
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
