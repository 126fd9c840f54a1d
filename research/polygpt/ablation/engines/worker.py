"""A worker process: takes tasks and answers each with its records or a failure.

    python -m polygpt.ablation.engines.worker               tasks on stdin, answers on stdout, one per line
    python -m polygpt.ablation.engines.worker TASK ANSWER   one task, from file to file

Output of runs is appended to `log.txt` in the task's folder.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polygpt.ablation.engines.base import EVERY, PROGRESS, Callback, Failure, Progress, Task
from polygpt.files import write_atomically

LOG = "log.txt"
"""File in a task's folder."""


def work(task_json: str, callback: Callback | None = None) -> str:
    """Performs the runs of a task.

    Args:
        task_json: `Task.to_json()`.
        callback: called after every step; default: writes notes for `Task.progress` to the task's folder.

    Returns:
        The records as a JSON list, in the order of the task's experiments. See `results.py`; they lack key, variant,
        point and stage.

    Raises:
        UserError: the experiment, its data or the folder is invalid.
        KeyboardInterrupt: SIGINT or SIGTERM asked the process to stop; the task can be resumed.
    """
    from polygpt.ablation import seeds  # local import: a process that only sends tasks does not need it
    from polygpt.ablation.measures import DECODING, decode_seconds
    from polygpt.ablation.provenance import made

    task = Task.from_json(task_json)
    task.folder.mkdir(parents=True, exist_ok=True)
    callback = callback or _Notes(task)
    made(task.experiments[0])  # hash the source now; files may be edited during training
    records = seeds.run(task, callback)
    if DECODING in task.measured:
        seconds = decode_seconds(task.experiments[0])
        records = [{**record, "metrics": {**record["metrics"], DECODING: seconds}} for record in records]
    return json.dumps(records)


class _Notes:
    """Writes notes for `Task.progress`."""

    def __init__(self, task: Task):
        self.path, self.last = task.folder / PROGRESS, -EVERY

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self.last >= EVERY or progress.step == progress.steps:
            self.last = time.monotonic()
            write_atomically(self.path, json.dumps(dataclasses.asdict(progress)))


def answer(task_json: str) -> str:
    """Runs a task; returns the outcome as JSON, for `read`. SIGTERM and SIGINT end it like `work`."""
    try:
        return json.dumps({"records": json.loads(work(task_json))})
    except Exception as error:
        return json.dumps({"failure": dataclasses.asdict(Failure.of(error))})


def read(text: str) -> list[dict[str, Any]] | Failure:
    """Parses an answer into records or a failure."""
    data = json.loads(text)
    return Failure(**data["failure"]) if "failure" in data else data["records"]


def end_with_parent() -> None:
    """Makes Linux send SIGTERM when the parent process ends, even if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main(argv: list[str]) -> int:
    """Answers tasks; returns the exit code, 130 after a signal."""
    end_with_parent()
    try:
        if argv:
            task, to = map(Path, argv)
            write_atomically(to, answer(task.read_text(encoding="utf-8")))
            return 0
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
            for line in sys.stdin:
                with _printed_to(Task.from_json(line).folder):
                    said = answer(line)
                answers.write(said + "\n")
                answers.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader is gone
        return 1
    return 0


@contextlib.contextmanager
def _printed_to(folder: Path) -> Iterator[None]:
    """Context manager: redirects the process's output to the folder's log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
