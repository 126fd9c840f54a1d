"""Runs a search, in this process or in several, and reports its status."""

import dataclasses
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polygpt.ablation.engines import children
from polygpt.ablation.tune import Search
from polygpt.ablation.tuning import trials
from polygpt.ablation.tuning.storage import DEATHS, Storage
from polygpt.errors import UserError

EVERY = 1.0
"""Seconds between checks of worker processes."""
MODULE = "polygpt.ablation.tuning.trials"


@dataclasses.dataclass(frozen=True)
class Status:
    """Status of a running search.

    Attributes:
        finished: finished Optuna trials, in order of their start.
        running: last progress note of each running trial by number: "step", "steps" and "loss"; None before the first.
        wanted: total number of trials to run.
    """

    finished: list[Any]
    running: dict[int, dict[str, Any] | None]
    wanted: int


Callback = Callable[[Status], None]


def run(search: Search, folder: str | Path, *, workers: int = 1, callback: Callback = lambda status: None) -> Storage:
    """Runs the remaining trials of a search. The same call resumes a search that was stopped or killed.

    Args:
        search: the search.
        folder: folder of the search; several calls, also on other machines with a shared file system, may share it.
        workers: number of processes on this machine.
        callback: called with the status at intervals.

    Returns:
        The storage, with all trials.

    Raises:
        UserError: the folder has a different search, optuna is not installed, or data or settings are invalid.
        KeyboardInterrupt: a signal asked to stop; running trials are saved.
    """
    folder = Path(folder).absolute()
    storage = Storage(search, folder)
    callback(status(storage))
    if workers == 1:
        trials.work(storage, lambda: callback(status(storage)))
    else:
        _apart(storage, workers, callback)
    callback(status(storage))
    return storage


def status(storage: Storage) -> Status:
    """The status of the search."""
    state = storage.optuna.trial.TrialState.RUNNING
    running = {
        trial.number: trials.progress(storage.place(trial)) for trial in storage.trials() if trial.state == state
    }
    return Status(storage.finished(), running, storage.search.trials)


def _apart(storage: Storage, workers: int, callback: Callback) -> None:
    """Runs workers as processes. A dead one is replaced; its trial is resumed, or abandoned after repeated deaths."""
    log = storage.folder / "workers.txt"
    alive: dict[int, subprocess.Popen] = {}  # by index of its share
    started: list[subprocess.Popen] = []
    shares = children.shares(workers)
    with children.terminated_on_exit(started):
        while True:
            for number, child in [(number, child) for number, child in alive.items() if child.poll() is not None]:
                del alive[number]
                if child.returncode > 0:
                    raise UserError(f"{_last_line(log)}: see {log}" if child.returncode != 2 else _last_line(log))
            elsewhere = max(0, len(storage.under_way()) - len(alive))  # trials run by other calls
            missing = storage.search.trials - len(storage.finished()) - elsewhere
            if missing <= 0 and not alive:
                return
            if len(started) > workers + DEATHS * storage.search.trials:
                raise UserError(f"workers keep dying: see {log}")
            while len(alive) < min(workers, missing):
                number = min(set(range(workers)) - set(alive))
                alive[number] = children.start(("-m", MODULE, str(storage.folder)), shares[number], log)
                started.append(alive[number])
            callback(status(storage))
            time.sleep(EVERY)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "a worker exited"
