"""The engine that runs tasks in several processes on this machine."""

import collections
import contextlib
import dataclasses
import os
import selectors
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from polygpt.ablation.engines import children, worker
from polygpt.ablation.engines.base import EVERY, Callback, Engine, Failure, Task
from polygpt.ablation.engines.watching import Watch

WORDS = ("-m", "polygpt.ablation.engines.worker")


@dataclasses.dataclass(frozen=True)
class Processes(Engine):
    """A pool of processes, each running one task at a time.

    A process that dies, for example out of memory, is restarted and its task resumes from its last save; the others are
    not affected. Ctrl-C ends all of them after they have saved.
    """

    workers: int | None = None
    """Number of processes; null for one per GPU, or one per core without GPUs."""
    retries: int = 2
    """Number of retries of a task whose process died."""

    def validate(self):
        self.require(self.workers is None or self.workers >= 1, "workers", "null or at least 1")
        self.require(self.retries >= 0, "retries", "at least 0")

    def run(self, tasks: Sequence[Task], callback: Callback) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        count = min(self.workers or children.count_gpus() or len(children.cores()) or os.cpu_count() or 1, len(tasks))
        pool = _Pool(self.retries, children.shares(count), Watch(callback))
        with children.terminated_on_exit(pool.started), contextlib.closing(pool.selector):
            yield from pool.run(tasks)


@dataclasses.dataclass
class _Busy:
    """A process with a task; `share` is the index of its share of the machine."""

    process: subprocess.Popen
    task: Task
    share: int


class _Pool:
    def __init__(self, retries: int, shares: list[children.Share], watch: Watch):
        self.retries, self.shares, self.watch = retries, shares, watch
        self.selector = selectors.DefaultSelector()
        self.started: list[subprocess.Popen] = []
        self.idle: dict[int, subprocess.Popen | None] = dict.fromkeys(range(len(shares)))  # None: not started yet
        self.deaths: collections.Counter[str] = collections.Counter()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, list[dict[str, Any]] | Failure]]:
        waiting, busy = collections.deque(tasks), {}
        while waiting or busy:
            while waiting and self.idle:
                made = self._give(waiting.popleft(), *self.idle.popitem())
                busy[made.process.stdout.fileno()] = made
            for key, _ in self.selector.select(EVERY):
                made = busy.pop(key.fd)
                self.selector.unregister(key.fd)
                line = made.process.stdout.readline()
                if line.endswith("\n"):
                    self.idle[made.share] = made.process
                    self.watch([made.task])  # it may have started and finished since the last check
                    yield made.task, worker.read(line)
                    continue
                self.idle[made.share] = None
                self.deaths[made.task.name] += 1
                if (ended := self._ended(made)) is None:
                    waiting.appendleft(made.task)
                else:
                    yield made.task, ended
            self.watch(made.task for made in busy.values())

    def _give(self, task: Task, share: int, process: subprocess.Popen | None) -> _Busy:
        if process is None or process.poll() is not None:
            task.folder.mkdir(parents=True, exist_ok=True)
            process = children.start(WORDS, self.shares[share], task.folder / worker.LOG)
            self.started.append(process)
        with contextlib.suppress(BrokenPipeError):  # it has died; reading its stdout will show
            process.stdin.write(task.to_json() + "\n")
            process.stdin.flush()
        self.selector.register(process.stdout.fileno(), selectors.EVENT_READ)
        return _Busy(process, task, share)

    def _ended(self, made: _Busy) -> Failure | None:
        """The failure of a task whose process died; None if it will be retried."""
        code = made.process.wait()
        times = self.deaths[made.task.name]
        if times <= self.retries:
            return None
        tried = f", {times} times" if times > 1 else ""
        return Failure(
            f"its process {children.describe_failure(code)}{tried}: see {made.task.folder / worker.LOG}", False
        )
