"""Loggers of a run's metrics: one protocol, one class per destination; TensorBoard is in `tensorboard.py`.

`metrics.jsonl` has only values that a repeated run reproduces exactly; times are in `timing.jsonl`.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polygpt.evaluation.likelihood import COUNTS
from polygpt.files import plain


class Logger(Protocol):
    """Receives events of a run. Steps increase, except after a rewind. `flush` is called before each checkpoint.

    Where several seeds are trained together, losses and metrics are lists, and the results of an evaluation are a list
    "seeds", in which those of a stopped seed are {}.
    """

    def compiling(self, step: int, seconds: float | None) -> None:
        """The process's first step is about to compile (None), or took this many seconds to compile."""

    def step(self, step: int, loss: float) -> None:
        """Every step."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of the training step, every `train.log_every` steps."""

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """seconds (per step), tokens_per_second and input_wait (share of the time) since the last call."""

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        """Results of `evaluate` ("tasks", "modality_gain"), and "metric", which selects the best checkpoint."""

    def rewind(self, step: int, spike: int) -> None:
        """After the spike at step `spike` the run resumes from `step`: discard what was logged for later steps."""

    def flush(self) -> None:
        """Makes everything durable, so that it survives the process."""

    def close(self) -> None:
        """Flushes and closes."""


class Silent:
    """Does nothing: the base class of the loggers below."""

    def compiling(self, step, seconds):
        pass

    def step(self, step, loss):
        pass

    def metrics(self, step, values):
        pass

    def timing(self, step, values):
        pass

    def evaluation(self, step, results):
        pass

    def rewind(self, step, spike):
        pass

    def flush(self):
        pass

    def close(self):
        self.flush()


class JsonLines(Silent):
    """`metrics.jsonl` and `timing.jsonl` in the run folder.

    Lines: {"step": 10, "loss": ..., "loss/next_token": ..., "gradient_norm": ...},
    {"step": 100, "metric": ..., "evaluation": {task: {measure: value}}, "modality_gain": {...}}, and
    {"step": 10, "seconds": ..., "tokens_per_second": ..., "input_wait": ...}. A value that is not finite is null.
    After a rewind from step 57 to 50, {"step": 51, "rewound_from": 57} replaces the lines of steps 51 to 57.

    Args:
        workdir: the run folder.
        step: the run continues after this step; later lines from an interrupted run are removed.
    """

    def __init__(self, workdir: Path, step: int):
        self._workdir = workdir
        self._open(step)

    def metrics(self, step, values):
        self._write("metrics", {"step": step, **values})

    def timing(self, step, values):
        self._write("timing", {"step": step, **values})

    def evaluation(self, step, results):
        if step == self._evaluated:
            return
        others = {name: value for name, value in results.items() if name != "tasks"}
        self._write("metrics", {"step": step, "evaluation": results["tasks"], **others})

    def rewind(self, step, spike):
        self.close()
        self._open(step)
        # Numbered as the next step, so that a run resumed from `step` keeps the line.
        self._write("metrics", {"step": step + 1, "rewound_from": spike})

    def flush(self):
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self):
        for file in self._files.values():
            file.close()

    def _open(self, step: int) -> None:
        self._files = {}
        for name in ("metrics", "timing"):
            path = self._workdir / f"{name}.jsonl"
            last = truncate(path, step)
            if name == "metrics":
                # A process killed after logging an evaluation may not have saved the fact.
                self._evaluated = step if _step(last) == step and b'"evaluation"' in last else None
            self._files[name] = path.open("a", encoding="utf-8")

    def _write(self, name: str, line: dict) -> None:
        file: TextIO = self._files[name]
        file.write(json.dumps(plain(line), allow_nan=False) + "\n")
        file.flush()


def truncate(path: Path, step: int) -> bytes:
    """Removes lines after `step` and incomplete lines from a file of JSON lines; returns the last remaining line."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        whole = [line for line in file if _step(line) <= step]
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(b"".join(whole))
    os.replace(fresh, path)
    return whole[-1] if whole else b""


def last_step(path: Path) -> int:
    """The last step that was taken by what a file of JSON lines says; 0 without a file."""
    last = 0
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as file:
        for line in file:
            if math.isfinite(step := _step(line)):
                last = int(step) - (b'"rewound_from"' in line)  # that step is still to be taken
    return last


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


class Terminal(Silent):
    """Progress on stderr: a bar on a terminal, otherwise a line every `seconds`."""

    def __init__(self, step: int, steps: int, seconds: float = 10.0):
        self._console = Console(stderr=True, highlight=False)
        self._steps, self._first, self._begin = steps, None, 0.0
        self._seconds, self._printed, self._speed = seconds, -math.inf, ""
        self._bar = None
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, speed_estimate_period=60)
            self._task = self._bar.add_task("", total=steps, completed=step, figures="")
            self._bar.start()

    def compiling(self, step, seconds):
        said = "compiling the step ..." if seconds is None else f"compiled in {seconds:.1f} s"
        self._console.print(said, soft_wrap=True)

    def step(self, step, loss):
        if self._first is None:  # start timing after the first step, which compiles
            self._first, self._begin = step, time.monotonic()
        figures = f"loss {loss:.4f}{self._speed}"
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._printed >= self._seconds or step == self._steps:
            self._printed = time.monotonic()
            if step > self._first:
                left = (self._printed - self._begin) / (step - self._first) * (self._steps - step)
                figures += "  {}:{:02} left".format(*divmod(round(left), 60))
            self._console.print(f"step {step}/{self._steps}  {figures}", soft_wrap=True)

    def timing(self, step, values):
        self._speed = f"  {values['tokens_per_second']:,.0f} tokens/s  input wait {values['input_wait']:.0%}"

    def evaluation(self, step, results):
        tasks = results["tasks"]
        shown = [f"held-out {measure}: {values}" for measure, values in _by_measure(tasks).items()]
        self._console.print(f"step {step}, {'; '.join(shown)}", soft_wrap=True)

    def rewind(self, step, spike):
        self._first = None
        self._console.print(f"step {spike}: loss spike; back to step {step}, skipping data", soft_wrap=True)

    def close(self):
        if self._bar:
            self._bar.stop()


def _by_measure(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The losses of all tasks as text, and the other values of tasks without one, by measure."""
    found: dict[str, list[str]] = {}
    for task, figures in tasks.items():
        for measure in ["loss"] if "loss" in figures else figures.keys() - COUNTS:
            found.setdefault(measure, []).append(f"{task} {figures[measure]:.4f}")
    return {measure: "  ".join(values) for measure, values in sorted(found.items())}
