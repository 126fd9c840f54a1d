"""Runs an ablation: finds missing runs, hands them to an engine, and records results as they arrive."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from polygpt.ablation import provenance, results
from polygpt.ablation.engines.base import Engine, Failure, Progress, Task
from polygpt.ablation.engines.inline import Inline
from polygpt.ablation.measures import DECODING
from polygpt.ablation.results import Frame
from polygpt.ablation.study import Ablation, Point, places
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.runtime.lock import hold

Stage = Literal["tuning", "comparison"]

WORK = ".work"
"""Folder of unfinished work, next to the results. Git ignores it."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage starts.

    Attributes:
        stage: the stage.
        runs: number of runs in it.
        done: number of runs that exist already.
        tasks: tasks for the engine.
    """

    stage: Stage
    runs: int
    done: int
    tasks: tuple[Task, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """Runs are finished and written to the results. `records` are their lines."""

    records: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Failed:
    """A task failed."""

    task: Task
    failure: Failure


Callback = Callable[[Planned | Progress | Finished | Failed], None]
"""Receives each event."""


def run_all(
    ablation: Ablation,
    folder: str | Path,
    *,
    seeds: int | None = None,
    engine: Engine | None = None,
    callback: Callback = lambda event: None,
    strict_code: bool = False,
) -> Frame:
    """Performs all missing runs of an ablation: first those for tuning, then those for the comparison.

    Args:
        ablation: the ablation.
        folder: folder of `results.jsonl`; usually that of the ablation's file.
        seeds: number of seeds, from 0; by default the ablation's.
        engine: where runs are computed; by default in this process.
        callback: receives events.
        strict_code: whether all runs must share one known, committed version of the library source.

    Returns:
        The comparison.

    Raises:
        UserError: another process is running it, tasks failed (the results of the others are kept), or with
            `strict_code` runs have different, unknown or uncommitted code.
        KeyboardInterrupt: a signal asked to stop; the same call resumes.
    """
    folder = Path(folder).absolute()
    wanted = range(ablation.seeds if seeds is None else seeds)
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    with hold(work, "wait until it ends"):
        write_atomically(work / ".gitignore", "*\n")
        runner = _Runner(ablation, folder, engine or Inline(), callback, strict_code)
        if ablation.tuned:
            grid = [made for variant, at in places(ablation) for made in results.candidates(ablation, variant, at)]
            runner.stage("tuning", grid, results.tuning_seeds(ablation))
        chosen = [results.choose(ablation, variant, at, runner.found) for variant, at in places(ablation)]
        runner.stage("comparison", chosen, wanted)
        return results.frame(ablation, runner.found.values(), wanted)


class _Runner:
    def __init__(self, ablation: Ablation, folder: Path, engine: Engine, callback: Callback, strict_code: bool):
        self.ablation, self.folder, self.engine, self.callback = ablation, folder, engine, callback
        self.strict_code, self.made = strict_code, []
        self.path = folder / results.RESULTS
        self.found = results.by_key(ablation, results.read(self.path))

    def stage(self, stage: Stage, points: Iterable[Point], seeds: Iterable[int]) -> None:
        """Performs the missing runs of the points. A run shared by several points is performed once."""
        asked: dict[str, list[Point]] = {}
        missing: dict[str, tuple[Point, dict[int, str]]] = {}
        for made in points:
            for seed in seeds:
                key = results.key(made.experiment.replace(seed=seed))
                if key not in self.found and key not in asked:
                    missing.setdefault(made.name, (made, {}))[1][seed] = key
                asked.setdefault(key, []).append(made)
        if self.strict_code:
            self._require_one_code([self.found[key] for key in asked if key in self.found], missing)
        # Compute keys now: code files may be edited while their runs train.
        keys = {made.name: list(some.values()) for made, some in missing.values()}
        tasks = tuple(self._task(made, some) for made, some in missing.values())
        self.callback(Planned(stage, len(asked), len(asked) - sum(map(len, keys.values())), tasks))
        failed = []
        for task, done in self.engine.run(tasks, self.callback) if tasks else ():
            if isinstance(done, Failure):
                failed.append(self._failed(task, done))
                continue
            pairs = [({"key": key, **record}, asked[key]) for key, record in zip(keys[task.name], done, strict=True)]
            self._finished(task, stage, pairs)
        if failed:
            more = f" ({len(failed)} of {len(tasks)} tasks failed)" if len(failed) > 1 else ""
            raise UserError(f"{failed[0]}{more}")

    def _require_one_code(self, there: list[Mapping[str, Any]], missing: Mapping[str, tuple[Point, Any]]) -> None:
        """Raises UserError unless existing and missing runs share their code."""
        self.made += [line["made"] for line in there]
        self.made += [provenance.made(point.experiment) for point, _ in missing.values()]
        if faults := provenance.faults(self.made):
            raise UserError(
                f"{faults[0]} Commit the library's changes and remove lines of other code from {self.path}, or omit "
                "--strict-code"
            )

    def _task(self, made: Point, keys: dict[int, str]) -> Task:
        experiments = tuple(made.experiment.replace(seed=seed) for seed in keys)
        folder = hashlib.sha256("".join(keys.values()).encode()).hexdigest()[:16]
        measured = (DECODING,) if DECODING in self.ablation.metrics() else ()
        return Task(made.name, experiments, self.folder / WORK / folder, measured)

    def _finished(self, task: Task, stage: Stage, pairs: list[tuple[dict[str, Any], list[Point]]]) -> None:
        """Writes each run once, under the first point that needs it, and reports it for all points."""
        lines = [results.labelled(record, asking[0], stage) for record, asking in pairs]
        results.append(self.path, lines)
        self.found |= {line["key"]: line for line in lines}
        shutil.rmtree(task.folder, ignore_errors=True)
        self.callback(
            Finished(tuple(results.labelled(record, made, stage) for record, asking in pairs for made in asking))
        )

    def _failed(self, task: Task, failure: Failure) -> str:
        self.callback(Failed(task, failure))
        if failure.final or not failure.trace:
            return f"{task.name}: {failure.message}"
        task.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(task.folder / "error.txt", failure.trace)
        return f"{task.name}: {failure.message}: see {task.folder / 'error.txt'}"
