"""A search run, in this process or in several, and what is known of it meanwhile."""

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
"""Seconds between two looks at what several processes do."""
MODULE = "polygpt.ablation.tuning.trials"


@dataclasses.dataclass(frozen=True)
class Status:
    """A search under way.

    Attributes:
        finished: the trials that are done, Optuna's, in the order in which they were begun.
        running: by number, the last note of those that are not, "step", "steps" and "loss"; None before the first.
        wanted: how many are to be done.
    """

    finished: list[Any]
    running: dict[int, dict[str, Any] | None]
    wanted: int


Tell = Callable[[Status], None]


def run(search: Search, folder: str | Path, *, workers: int = 1, tell: Tell = lambda status: None) -> Storage:
    """Makes the trials of a search that are not there yet. The same call goes on where one was stopped or killed.

    Args:
        search: what is searched.
        folder: of the search; other calls, on this machine or, over a shared file system, on others, may work on it.
        workers: processes of this machine.
        tell: is told how it stands, now and then.

    Returns:
        The storage, with all trials.

    Raises:
        UserError: if the folder holds another search, optuna is not installed, or data or settings are at fault.
        KeyboardInterrupt: a signal asked to stop; what is under way is saved.
    """
    folder = Path(folder).absolute()
    storage = Storage(search, folder)
    tell(status(storage))
    if workers == 1:
        trials.work(storage, lambda: tell(status(storage)))
    else:
        _apart(storage, workers, tell)
    tell(status(storage))
    return storage


def status(storage: Storage) -> Status:
    """How the search stands."""
    state = storage.optuna.trial.TrialState.RUNNING
    running = {
        trial.number: trials.progress(storage.place(trial)) for trial in storage.trials() if trial.state == state
    }
    return Status(storage.finished(), running, storage.search.trials)


def _apart(storage: Storage, workers: int, tell: Tell) -> None:
    """In processes of their own. One that dies is replaced; its trial is gone on with, or given up in the end."""
    log = storage.folder / "workers.txt"
    alive: dict[int, subprocess.Popen] = {}  # by the number of its share
    started: list[subprocess.Popen] = []
    shares = children.shares(workers)
    with children.ended(started):
        while True:
            for number, child in [(number, child) for number, child in alive.items() if child.poll() is not None]:
                del alive[number]
                if child.returncode > 0:
                    raise UserError(f"{_last_line(log)}: see {log}" if child.returncode != 2 else _last_line(log))
            elsewhere = max(0, len(storage.under_way()) - len(alive))  # by other calls
            missing = storage.search.trials - len(storage.finished()) - elsewhere
            if missing <= 0 and not alive:
                return
            if len(started) > workers + DEATHS * storage.search.trials:
                raise UserError(f"workers die again and again: see {log}")
            while len(alive) < min(workers, missing):
                number = min(set(range(workers)) - set(alive))
                alive[number] = children.start(("-m", MODULE, str(storage.folder)), shares[number], log)
                started.append(alive[number])
            tell(status(storage))
            time.sleep(EVERY)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "a worker ended"
