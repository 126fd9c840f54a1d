"""Search for the fastest candidate that fits: estimates all candidates analytically and compiles the most promising.

The rank of a candidate is the mean of two step times: with full overlap and without overlap. Each compiled program
corrects the predictions of similar candidates, and the search next compiles the candidate that ranks best after
correction. Only a candidate that was compiled and fits can win.
"""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from polygpt.errors import UserError
from polygpt.scale.plan.candidates import Candidate, candidates, current, smaller
from polygpt.scale.plan.facts import Facts, facts, mesh_facts
from polygpt.scale.plan.prediction import BOUNDS, Correction, Prediction, predict
from polygpt.scale.plan.roofline import Roofline
from polygpt.scale.plan.target import Target
from polygpt.scale.plan.worker import plan_in_subprocess
from polygpt.sharding import AXES
from polygpt.training.experiment import Experiment

ROOM = 0.98
"""Maximum share of usable memory that a candidate may be predicted to need to be compiled."""
MEMORY_FACTOR = 1.5
"""Correction factor for predicted temporaries before the first compilation."""
TRIES = 3
"""Maximum number of candidates to compile per set of changes until one fits."""


@dataclasses.dataclass
class Trial:
    """A candidate with its prediction and, once compiled, its plan.

    Attributes:
        candidate: the candidate.
        prediction: the analytic estimates.
        data: its plan as JSON data; {"failed": reason} if compilation failed; None if it was not compiled.
    """

    candidate: Candidate
    prediction: Prediction
    data: dict | None = None

    @property
    def fits(self) -> bool:
        """Whether it was compiled and fits."""
        return bool(self.data and self.data.get("memory") and self.data["memory"]["fits"])

    def rank(self, correction: Correction) -> float:
        """Seconds by which candidates are compared."""
        if self.fits and self.data["roofline"]:
            return (self.data["roofline"]["step"] + self.data["roofline"]["serial"]) / 2
        return rank(correction.roofline(self.prediction))

    def memory(self, correction: Correction) -> float:
        """Bytes per device: the compiler's figure if it was compiled and fits, else the prediction."""
        return self.data["memory"]["total"] if self.fits else correction.memory(self.prediction)


def rank(roofline: Roofline) -> float:
    """The mean of the step times with full overlap and without overlap."""
    return (roofline.step + roofline.serial) / 2


@dataclasses.dataclass
class SearchResult:
    """State and result of a search.

    Attributes:
        trials: all candidates, the most promising first.
        memory_factors: correction factor of temporaries by (remat of the decoder, remat of towers); None is for any.
        time_factors: by (remat of the decoder, remat of towers, mesh axes), the factors of time bounds of each compiled
            candidate.
        seconds: duration of the search.
        experiment, target: the arguments of the search.
        room: maximum share of usable memory that a candidate may be predicted to need to be compiled.
    """

    experiment: Experiment
    target: Target
    trials: list[Trial]
    memory_factors: dict[Any, float] = dataclasses.field(default_factory=dict)
    time_factors: dict[Any, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    room: float = ROOM

    def correction(self, trial: Trial) -> Correction:
        """The correction of a candidate's predictions.

        The factor of memory comes from a compiled candidate with the same remat, else from any. The factors of time
        come from candidates with the same remat and mesh axes, because errors differ between kinds of mesh.
        """
        remat, of_mesh = _kinds(trial.candidate)
        factor = self.memory_factors.get(remat, self.memory_factors.get(None, MEMORY_FACTOR))
        seen = self.time_factors.get((*remat, of_mesh), [])
        return Correction(factor, {name: _mean([one[name] for one in seen if name in one]) for name in BOUNDS})

    def rank(self, trial: Trial) -> float:
        """Seconds by which a candidate is compared."""
        return trial.rank(self.correction(trial))

    def memory(self, trial: Trial) -> float:
        """Bytes per device of a candidate."""
        return trial.memory(self.correction(trial))

    @property
    def compiled(self) -> list[Trial]:
        """Compiled candidates: first those that fit, fastest first."""
        return sorted(
            (trial for trial in self.trials if trial.data), key=lambda trial: (not trial.fits, self.rank(trial))
        )

    @property
    def best(self) -> Trial | None:
        """The fastest compiled candidate that fits."""
        return next((trial for trial in self.compiled if trial.fits), None)

    def has_enough(self, enough: int | None) -> bool:
        """Whether at least `enough` compiled candidates fit."""
        return enough is not None and sum(trial.fits for trial in self.trials) >= enough

    def next(self) -> Trial | None:
        """The next candidate to compile: without a best, one that is likely to fit; None if none can beat the best."""
        limit = self.room * self.target.usable
        open_ = [trial for trial in self.trials if trial.data is None]
        within = [trial for trial in open_ if self.memory(trial) <= limit]
        if (best := self.best) is None:  # iterates over all candidates
            return min(within, key=self.rank, default=None) or min(open_, key=self.memory, default=None)
        trial = min(within, key=self.rank, default=None)
        return trial if trial and self.rank(trial) < 0.995 * self.rank(best) else None

    def learn(self, trial: Trial) -> None:
        """Updates the corrections from a compiled candidate."""
        data, prediction = trial.data, trial.prediction
        remat, of_mesh = _kinds(trial.candidate)
        if memory := data.get("memory"):
            temporaries = memory["temporaries"] + memory["padding"] + memory["output"] + memory["program"]
            factor = temporaries / prediction.temporaries
        else:
            said = data.get("exhausted") or {}
            needed = said.get("temporaries") or (said.get("all") or 0) - prediction.state
            least = self.target.usable - prediction.state  # it was more than that
            factor = max(needed, 1.05 * least, 0) / prediction.temporaries
        self.memory_factors[remat] = self.memory_factors[None] = factor
        if roofline := data.get("roofline"):
            pairs = {name: (roofline[name], getattr(prediction.roofline, name)) for name in BOUNDS}
            errors = {name: real / guess for name, (real, guess) in pairs.items() if real and guess}
            self.time_factors.setdefault((*remat, of_mesh), []).append(errors)


def _kinds(candidate: Candidate) -> tuple[tuple, tuple]:
    """((remat of the decoder, remat of towers), (mesh axes larger than 1, axes that split features))."""
    mesh = candidate.mesh
    axes = tuple(axis for axis in AXES if getattr(mesh, axis) > 1)
    return (candidate.remat, candidate.towers), (*axes, *mesh.rules["features"])


def _mean(factors: list[float]) -> float:
    """The geometric mean; 1 for an empty list."""
    return math.exp(sum(map(math.log, factors)) / len(factors)) if factors else 1.0


def search(
    experiment: Experiment,
    target: Target,
    seconds: float,
    callback: Callable[[str], None],
    at_once: int = 2,
    enough: int | None = None,
    room: float = ROOM,
) -> SearchResult:
    """Searches within a time limit.

    Args:
        experiment: the experiment; its batch and model are not changed.
        target: the devices.
        seconds: time limit; compilations still running at the limit are stopped.
        callback: receives lines of progress.
        at_once: number of concurrent compilations.
        enough: stop when this many compiled candidates fit; None: continue while a better one is possible.
        room: maximum share of usable memory that a candidate may be predicted to need to be compiled. Compilation is
            faster with more free memory.

    Raises:
        UserError: no mesh divides the batch evenly, or the target has no published peak.
    """
    if target.peak is None:
        raise UserError(
            f"--search ranks by time, which --on {target.name} does not have: plan for a TPU or GPU, or omit --search"
        )
    begin = time.monotonic()
    target.prepare()
    known = facts(experiment, target)
    found = SearchResult(experiment, target, _predicted(experiment, known, target), room=room)
    if not found.trials:
        rows = f"data.batch_size is {experiment.data.batch_size}"
        raise UserError(f"--search: {rows}, which no mesh of {target.count} devices divides evenly: change it")
    found.trials.sort(key=found.rank)
    fit = sum(found.memory(trial) <= room * target.usable for trial in found.trials)
    share = "" if room == ROOM else f" in {room:.0%} of the memory"
    callback(f"{len(found.trials)} candidates, {fit} predicted to fit{share}; compiling the most promising")

    def left() -> float:
        return seconds - (time.monotonic() - begin)

    running: dict[concurrent.futures.Future, Trial] = {}
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while True:
            while len(running) < at_once and left() > 20 and not found.has_enough(enough) and (trial := found.next()):
                callback(f"compiling {trial.candidate.summary()}: {_figures(found, trial)} predicted")
                trial.data = {"failed": "compiling"}
                limit = min(left(), max(120.0, seconds / 2))
                running[pool.submit(_compiled, experiment, target, trial, limit)] = trial
            if not running:
                break
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                trial = running.pop(future)
                trial.data = future.result()
                if "failed" not in trial.data:
                    found.learn(trial)
                callback(f"  {_outcome(found, trial)} ({seconds - left():.0f} s)")
    found.trials.sort(key=found.rank)
    found.seconds = time.monotonic() - begin
    return found


def nearest(
    experiment: Experiment, target: Target, data: dict, seconds: float, callback: Callable[[str], None]
) -> list[dict]:
    """Up to three smallest sets of changes that make an experiment fit that does not fit as it is.

    For each set of settings (mesh, remat, microbatches; batch size), smallest first, it compiles the fastest candidate
    that is predicted to fit, then the next if it does not fit. Without time left, a candidate is marked as predicted.

    Args:
        experiment: the experiment.
        target: the devices.
        data: the experiment's plan as JSON data.
        seconds: time limit for compilation.
        callback: receives lines of progress.
    """
    begin = time.monotonic()
    known, mesh, found = facts(experiment, target), data["settings"]["mesh"], SearchResult(experiment, target, [])
    every = math.prod(mesh.values()) == target.count  # False for a single device of several
    now = current(experiment, target.count, mesh if every else None)
    if every and (here := _predict(experiment, known, target, now)):
        found.learn(Trial(now, here, data))
    answers: list[dict] = []
    for kinds, chain in sorted(smaller(now).items(), key=lambda item: len(item[0])):
        trials = [Trial(one, guess) for one in chain if (guess := _predict(experiment, known, target, one))]
        for _ in range(TRIES):
            within = [trial for trial in trials if trial.data is None and found.memory(trial) <= ROOM * target.usable]
            if not within:
                break
            trial = min(within, key=found.rank if target.peak else found.memory)
            left = seconds - (time.monotonic() - begin)
            if left > 20:
                callback(f"compiling {trial.candidate.summary()}: {_figures(found, trial)} predicted")
                trial.data = _compiled(experiment, target, trial, left)
                callback(f"  {_outcome(found, trial)}")
                if "failed" in trial.data:
                    continue
                found.learn(trial)
            if trial.data is None or trial.fits:
                answer = {
                    "change": list(kinds),
                    "overrides": trial.candidate.overrides(experiment),
                    "compiled": trial.fits,
                }
                answers.append(answer | {"memory": found.memory(trial), "usable": target.usable})
                break
        if len(answers) == 3:
            break
    return answers


def _compiled(experiment: Experiment, target: Target, trial: Trial, limit: float) -> dict:
    try:
        return plan_in_subprocess(trial.candidate.apply(experiment), target, limit)
    except UserError as error:
        return {"failed": str(error)}


def _predicted(experiment: Experiment, known: Facts, target: Target) -> list[Trial]:
    """All candidates, unsorted. Shared values are computed once, because there may be tens of thousands of them."""
    applied: dict[tuple, Experiment] = {}
    trials, mesh, of_mesh = [], None, None
    for candidate in candidates(experiment, target):
        if candidate.mesh is not mesh:
            mesh, of_mesh = candidate.mesh, mesh_facts(candidate.mesh, known)
        if of_mesh is None:
            continue
        without = candidate.remat, candidate.towers, candidate.microbatches  # arithmetic takes the mesh from `here`
        if without not in applied:
            applied[without] = candidate.apply(experiment)
        here = dataclasses.replace(of_mesh, schedule=candidate.schedule) if candidate.schedule else of_mesh
        trials.append(Trial(candidate, predict(applied[without], known, target, here)))
    return trials


def _predict(experiment: Experiment, known: Facts, target: Target, candidate: Candidate) -> Prediction | None:
    here = mesh_facts(candidate.piped, known)
    return here and predict(candidate.apply(experiment), known, target, here)


def _figures(found: SearchResult, trial: Trial) -> str:
    return f"{found.memory(trial) / 2**30:.1f} GiB, {found.rank(trial):.3g} s"


def _outcome(found: SearchResult, trial: Trial) -> str:
    if trial.fits:
        ceiling = f", MFU ceiling {trial.data['roofline']['mfu_ceiling']:.1%}" if trial.data["roofline"] else ""
        return f"fits: {_figures(found, trial)}{ceiling}: {trial.candidate.summary()}"
    reason = trial.data.get("failed") or "does not fit"
    return f"{reason}: {trial.candidate.summary()}"
