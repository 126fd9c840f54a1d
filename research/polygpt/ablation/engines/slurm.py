"""The engine for a SLURM cluster: a job array with one job per task, through submitit."""

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polygpt.ablation.engines import worker
from polygpt.ablation.engines.base import EVERY, Callback, Engine, Failure, Task
from polygpt.ablation.engines.watching import Watch
from polygpt.scale.launch import slurm

PROGRAM = (sys.executable, "-m", "polygpt.ablation.engines.worker")
TASK, ANSWER = "task.json", "answer.json"
"""Files in a task's folder: input and output of its job."""
DELAY = 60.0
"""Seconds that a shared file system may take to show a file written by another node."""


@dataclasses.dataclass(frozen=True)
class Slurm(Engine):
    """Single-process jobs. The ablation's folder must be on a shared file system.

    Before its time limit, or on preemption, a job saves and is requeued. Ctrl-C cancels the remaining jobs and keeps
    what they saved.
    """

    cluster: Literal["slurm", "local"] = "slurm"
    """Where jobs run; local is submitit's emulation on this machine, which starts all jobs at once."""
    minutes: int = 240
    """Time limit per job; a job that needs longer is requeued, as often as submitit allows."""
    at_once: int = 64
    """Maximum number of jobs that run at the same time."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further submitit parameters: `{"gpus_per_node": 1, "cpus_per_task": 8, "slurm_partition": "gpu"}`."""
    retries: int = 2
    """Number of resubmissions of a task whose job failed: killed, out of memory, broken node."""

    def validate(self):
        self.require(self.minutes >= 1, "minutes", "at least 1")
        self.require(self.at_once >= 1, "at_once", "at least 1")
        self.require(self.retries >= 0, "retries", "at least 0")

    def run(self, tasks: Sequence[Task], callback: Callback) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        if not tasks:
            return
        array, watch = _Array(self, tasks[0].folder.parent / "slurm"), Watch(callback)
        with array.cancelled():
            array.submit(tasks)
            while array.jobs:
                for task, job in list(array.jobs.values()):
                    if job.done() and (done := array.ended(task, job)) is not None:
                        yield task, done
                watch(task for task, _ in array.jobs.values())
                time.sleep(EVERY if array.jobs else 0)


class _Array:
    def __init__(self, engine: Slurm, folder: Path):
        self.engine, self.folder = engine, folder
        self.jobs: dict[str, tuple[Task, Any]] = {}
        self.deaths: collections.Counter[str] = collections.Counter()
        settings = dict(engine.settings)
        if engine.cluster == "slurm":
            settings["slurm_array_parallelism"] = engine.at_once
        self.executor = slurm.executor(folder, engine.cluster, "ablation", 1, 1, engine.minutes, settings)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Submits tasks as one array."""
        calls = []
        for task in tasks:
            task.folder.mkdir(parents=True, exist_ok=True)
            (task.folder / ANSWER).unlink(missing_ok=True)
            (task.folder / TASK).write_text(task.to_json(), encoding="utf-8")
            calls.append(slurm.Task([str(task.folder / TASK), str(task.folder / ANSWER)], PROGRAM))
        with slurm.submission_errors(), self.executor.batch():
            jobs = [self.executor.submit(call) for call in calls]
        self.jobs |= {task.name: (task, job) for task, job in zip(tasks, jobs, strict=True)}

    def ended(self, task: Task, job: Any) -> list[dict[str, Any]] | Failure | None:
        """The outcome of a task whose job has ended; None if it was resubmitted."""
        del self.jobs[task.name]
        error = job.exception()
        path, deadline = task.folder / ANSWER, time.monotonic() + (DELAY if error is None else 0)
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(EVERY)
        if path.exists():
            return worker.read(path.read_text(encoding="utf-8"))
        self.deaths[task.name] += 1
        if (times := self.deaths[task.name]) <= self.engine.retries:
            return self.submit([task])
        said = slurm.reason(error) if error is not None else "no answer was written"
        tried = f"{times} times, last " if times > 1 else ""
        return Failure(f"its job failed, {tried}{job.job_id}: {said}: see {self.folder}", False)

    @contextlib.contextmanager
    def cancelled(self) -> Iterator[None]:
        """On exit, cancels all remaining jobs."""
        try:
            yield
        finally:
            for _, job in self.jobs.values():
                with contextlib.suppress(Exception):  # it has ended meanwhile
                    job.cancel()
