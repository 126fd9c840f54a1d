"""An ablation run: what is missing is worked out, handed to an engine, and written down as it comes in."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from polygpt.ablation import results
from polygpt.ablation.engines.base import Engine, Failure, Progress, Task
from polygpt.ablation.engines.inline import Inline
from polygpt.ablation.results import Frame
from polygpt.ablation.study import Ablation, Point, places
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.training.lock import hold

Stage = Literal["tuning", "comparison"]

WORK = ".work"
"""The folder of what is under way, beside the results. Git does not see it."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage begins.

    Attributes:
        stage: which.
        runs: of how many runs it is.
        done: how many of them are there from before.
        tasks: what is handed to the engine now.
    """

    stage: Stage
    runs: int
    done: int
    tasks: tuple[Task, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """Runs are done and written down. `records` are their lines."""

    records: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Failed:
    """A task has no results."""

    task: Task
    failure: Failure


Tell = Callable[[Planned | Progress | Finished | Failed], None]
"""Is told what happens."""


def run_all(
    ablation: Ablation,
    folder: str | Path,
    *,
    seeds: int | None = None,
    engine: Engine | None = None,
    tell: Tell = lambda event: None,
) -> Frame:
    """Makes all runs of an ablation that are not there yet: first those that tune, then those that are compared.

    Args:
        ablation: the question.
        folder: where `results.jsonl` is, or will be; the folder of the ablation's file.
        seeds: how many, from 0 on; by default as many as the ablation says.
        engine: where they are computed; by default in this process.
        tell: is told what happens.

    Returns:
        The comparison.

    Raises:
        UserError: if another process is running it, or tasks failed: of all that did not, the results are kept.
        KeyboardInterrupt: a signal asked to stop; the same call goes on from there.
    """
    folder = Path(folder).absolute()
    wanted = range(ablation.seeds if seeds is None else seeds)
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    with hold(work, "wait for it to end"):
        write_atomically(work / ".gitignore", "*\n")
        runner = _Runner(ablation, folder, engine or Inline(), tell)
        if ablation.tuned:
            grid = [made for variant, at in places(ablation) for made in results.candidates(ablation, variant, at)]
            runner.stage("tuning", grid, results.tuning_seeds(ablation))
        chosen = [results.choose(ablation, variant, at, runner.found) for variant, at in places(ablation)]
        runner.stage("comparison", chosen, wanted)
        return results.frame(ablation, runner.found.values(), wanted)


class _Runner:
    def __init__(self, ablation: Ablation, folder: Path, engine: Engine, tell: Tell):
        self.ablation, self.folder, self.engine, self.tell = ablation, folder, engine, tell
        self.path = folder / results.RESULTS
        self.found = {line["key"]: line for line in results.read(self.path)}

    def stage(self, stage: Stage, points: Iterable[Point], seeds: Iterable[int]) -> None:
        """Makes the runs of the points that are not there yet. Runs that several points ask for are made once."""
        asked: dict[str, list[tuple[Point, int]]] = {}
        for made in points:
            for seed in seeds:
                asked.setdefault(results.key(made.experiment.replace(seed=seed)), []).append((made, seed))
        missing: dict[str, tuple[Point, list[int]]] = {}
        for key, ((made, seed), *_) in asked.items():
            if key not in self.found:
                missing.setdefault(made.name, (made, []))[1].append(seed)
        tasks = tuple(self._task(made, some) for made, some in missing.values())
        self.tell(Planned(stage, len(asked), len(asked) - sum(len(task.seeds) for task in tasks), tasks))
        failed = []
        for task, done in self.engine.run(tasks, self.tell) if tasks else ():
            if isinstance(done, Failure):
                failed.append(self._failed(task, done))
            else:
                self._finished(task, done, stage, asked)
        if failed:
            more = f" ({len(failed)} of {len(tasks)} tasks failed)" if len(failed) > 1 else ""
            raise UserError(f"{failed[0]}{more}")

    def _task(self, made: Point, seeds: list[int]) -> Task:
        experiments = tuple(made.experiment.replace(seed=seed) for seed in seeds)
        keys = "".join(map(results.key, experiments))
        return Task(made.name, experiments, self.folder / WORK / hashlib.sha256(keys.encode()).hexdigest()[:16])

    def _finished(self, task: Task, records: list[dict[str, Any]], stage: Stage, asked: dict) -> None:
        lines = []
        for experiment, record in zip(task.experiments, records, strict=True):
            key = results.key(experiment)
            for made, _ in asked[key]:
                lines.append(results.labelled({"key": key, **record}, made, stage))
        whole = {line["key"]: line for line in reversed(lines)}  # each run once, under the point that came first
        results.append(self.path, whole.values())
        self.found |= whole
        shutil.rmtree(task.folder, ignore_errors=True)
        self.tell(Finished(tuple(lines)))

    def _failed(self, task: Task, failure: Failure) -> str:
        self.tell(Failed(task, failure))
        if failure.final or not failure.trace:
            return f"{task.name}: {failure.message}"
        task.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(task.folder / "error.txt", failure.trace)
        return f"{task.name}: {failure.message}: see {task.folder / 'error.txt'}"
