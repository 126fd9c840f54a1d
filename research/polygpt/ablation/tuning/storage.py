"""A search in its folder: its trials and the values to try next. Several processes may share it.

`search.json` describes the search; `journal.log` is Optuna's record of the trials; `trials/<number>` is the folder of a
trial, locked while it runs.
"""

import contextlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polygpt import spec
from polygpt.ablation.tune import Choice, Dimension, Float, Search
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.runtime.lock import hold

SEARCH, JOURNAL, TRIALS = "search.json", "journal.log", "trials"
MAY_CHANGE = ("trials", "sampler", "seed", "pruning")
"""Settings that may change when a search is resumed."""
DEATHS = 3
"""A trial is abandoned, and does not count, after this many processes died while running it."""
STARTUP = 10
"""Random trials before the sampler starts to learn from them; at most a third of all."""
LONGEST_WAIT = 120.0
"""Seconds that another process may take to lock its trial."""


def load_optuna() -> Any:
    """Imports Optuna and mutes its log. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("tune needs optuna, which is not installed: pip install -e '.[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def read_search(folder: Path) -> Search:
    """Reads the search of a folder. Raises UserError if there is none."""
    path = folder / SEARCH
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a search: it has no {SEARCH}")
    return spec.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


class Storage:
    """The trials of a search.

    Args:
        search: the search.
        folder: created if missing.

    Raises:
        UserError: the folder has a different search, or optuna is not installed.
    """

    def __init__(self, search: Search, folder: Path):
        self.optuna, self.search, self.folder = load_optuna(), search, folder
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._require_same()
            write_atomically(folder / SEARCH, json.dumps(spec.to_json(search), indent=1) + "\n")
            journal, path = self.optuna.storages.journal, folder / JOURNAL
            _mend(path, journal.JournalFileSymlinkLock(str(path)))
            directions = ["minimize" if search.direction == "lower" else "maximize", "minimize"]
            self.study = self.optuna.create_study(
                storage=self.optuna.storages.JournalStorage(journal.JournalFileBackend(str(path))),
                study_name="search",
                directions=directions[: 2 if search.against else 1],
                load_if_exists=True,
                pruner=self._pruner(),
            )

    def trials(self) -> list[Any]:
        """All current Optuna trials, in order of their start."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> list[Any]:
        """Trials that count: complete or pruned."""
        state = self.optuna.trial.TrialState
        return [trial for trial in self.trials() if trial.state in (state.COMPLETE, state.PRUNED)]

    def complete_ones(self) -> list[Any]:
        """Complete trials."""
        return [trial for trial in self.trials() if trial.state == self.optuna.trial.TrialState.COMPLETE]

    def failed(self) -> list[Any]:
        """Failed trials, whose values need not be the cause; they do not count."""
        fail = self.optuna.trial.TrialState.FAIL
        return [trial for trial in self.trials() if trial.state == fail and "reason" in trial.user_attrs]

    @contextlib.contextmanager
    def next(self) -> Iterator[tuple[Any, Path] | None]:
        """Yields the next Optuna trial and its folder, locked while entered; None if there are enough trials.

        Trials of dead processes come first, with the same values and in the same folder.
        """
        with contextlib.ExitStack() as stack:
            with self._alone():
                self._take_back()
                state = self.optuna.trial.TrialState
                under_way = [trial for trial in self.trials() if trial.state == state.RUNNING]
                if len(self.finished()) + len(under_way) >= self.search.trials:
                    found = None
                else:
                    self.study.sampler = self._sampler()
                    distributions = {
                        name: self._distribution(dimension) for name, dimension in self.search.dimensions.items()
                    }
                    trial = self.study.ask(distributions)
                    found = trial, self.place(trial)
                    found[1].mkdir(parents=True, exist_ok=True)
                    stack.enter_context(hold(found[1]))
            yield found

    def place(self, trial: Any) -> Path:
        """Folder of a trial."""
        return self.folder / TRIALS / str(trial.user_attrs.get("continues", trial.number))

    def complete(self, trial: Any, values: list[float]) -> None:
        """Records a complete trial."""
        self.study.tell(trial, values)

    def prune(self, trial: Any, reason: str) -> None:
        """Records a trial that was pruned or could not be run."""
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)

    def fail(self, trial: Any, reason: str) -> None:
        """Records a trial that failed for reasons unrelated to its values; it does not count."""
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)

    def leave(self, trial: Any, reason: str) -> None:
        """Records an interrupted trial, to be resumed."""
        self._again(trial.number, trial.params, dict(trial.user_attrs), reason)

    def _take_back(self) -> None:
        """Requeues the trials of dead processes, or abandons them after repeated deaths."""
        state = self.optuna.trial.TrialState
        for trial in self.trials():
            if trial.state != state.RUNNING or not self._deserted(trial):
                continue
            deaths = trial.user_attrs.get("deaths", 0) + 1
            if deaths < DEATHS:
                self._again(trial.number, trial.params, trial.user_attrs | {"deaths": deaths}, "its process died")
                continue
            reason = f"its process died {deaths} times"
            self.study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.study.tell(trial.number, state=state.FAIL)
            shutil.rmtree(self.place(trial), ignore_errors=True)

    def _again(self, number: int, values: dict[str, Any], attributes: dict[str, Any], reason: str) -> None:
        kept = {"continues": attributes.get("continues", number), "deaths": attributes.get("deaths", 0)}
        self.study.enqueue_trial(values, kept | {"after": reason})
        self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def under_way(self) -> list[Any]:
        """Running trials."""
        state = self.optuna.trial.TrialState.RUNNING
        return [trial for trial in self.trials() if trial.state == state and not self._deserted(trial)]

    def _deserted(self, trial: Any) -> bool:
        place = self.place(trial)
        if not place.exists():
            return True
        try:
            with hold(place):
                return True
        except UserError:
            return False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While entered, no other process starts a trial, so a running trial without a lock must be orphaned."""
        deadline = time.monotonic() + LONGEST_WAIT
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(hold(self.folder, "wait until it ends"))
                    break
                except UserError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield

    def _require_same(self) -> None:
        if not (self.folder / SEARCH).exists():
            return
        before = json.loads((self.folder / SEARCH).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(spec.to_json(self.search)))
        for name, old, new in spec.differences(before, now):
            if name == "better" and {old, new} == {None, self.search.direction}:
                continue  # both declare the same direction as the metric
            if name not in MAY_CHANGE:
                raise UserError(
                    f"{self.folder} has a different search: {name} is {_short(old)} there, {_short(new)} here: choose "
                    "another --folder"
                )

    def _sampler(self) -> Any:
        """Recreated for every trial, so that a resumed search proposes the same values as an uninterrupted one."""
        samplers, search, state = self.optuna.samplers, self.search, self.optuna.trial.TrialState
        if search.sampler == "qmc":
            return samplers.QMCSampler(scramble=True, seed=search.seed)  # counts its points in the journal
        begun = [trial for trial in self.trials() if trial.state != state.WAITING]
        known = sum("continues" not in trial.user_attrs for trial in begun)
        seed = int(np.random.SeedSequence([search.seed, known]).generate_state(1)[0])
        if search.sampler == "tpe":
            startup = max(2, min(STARTUP, search.trials // 3))
            # constant_liar treats running trials as bad, so that processes do not all try the same values.
            return samplers.TPESampler(n_startup_trials=startup, multivariate=True, constant_liar=True, seed=seed)
        return samplers.RandomSampler(seed) if search.sampler == "random" else samplers.NSGAIISampler(seed=seed)

    def _pruner(self) -> Any:
        """Steps are hundredths of a run."""
        pruners = self.optuna.pruners
        if self.search.pruning == "median":
            return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=20)
        if self.search.pruning == "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=10, reduction_factor=3)
        return pruners.NopPruner()

    def _distribution(self, dimension: Dimension) -> Any:
        made = self.optuna.distributions
        if isinstance(dimension, Choice):
            return made.CategoricalDistribution(dimension.names())
        if isinstance(dimension, Float):
            return made.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
        high = dimension.high - (dimension.high - dimension.low) % dimension.step
        return made.IntDistribution(dimension.low, high, log=dimension.log, step=dimension.step)


def _mend(path: Path, lock: Any) -> None:
    """Removes a partial last line left by a crash, after which appended lines would be unreadable."""
    if not path.exists():
        return
    lock.acquire()
    try:
        with path.open("rb+") as file:
            whole = file.read()
            if whole and not whole.endswith(b"\n"):
                file.truncate(whole.rfind(b"\n") + 1)
    finally:
        lock.release()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
