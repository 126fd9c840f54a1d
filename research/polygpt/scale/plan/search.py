"""The fastest way to run that fits: everything is predicted by arithmetic, the most promising are compiled.

A way is ranked by the mean of two times of a step: with everything overlapped and with nothing overlapped. A compiled
program corrects the predictions of those like it that are not compiled yet, so that the next to be compiled is the one
that looks best after all that is known. Only what was compiled, and fits, can win.
"""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from polygpt.errors import UserError
from polygpt.scale.plan.candidates import Candidate, candidates, current, smaller
from polygpt.scale.plan.facts import Facts, arranged, facts
from polygpt.scale.plan.prediction import BOUNDS, Correction, Prediction, predict
from polygpt.scale.plan.roofline import Roofline
from polygpt.scale.plan.target import Target
from polygpt.scale.plan.worker import plan_apart
from polygpt.sharding import AXES
from polygpt.training.experiment import Experiment

ROOM = 0.98
"""Share of the memory that a prediction may take to be worth compiling."""
LOW = 1.5
"""By how much predictions of temporaries are low, before anything is compiled."""
TRIES = 3
"""Ways of the same set of changes that are compiled until one fits."""


@dataclasses.dataclass
class Tried:
    """A way to run, predicted and perhaps compiled.

    Attributes:
        candidate: the way.
        prediction: by arithmetic.
        data: its plan as JSON data, once compiled; {"failed": why} if that did not come to an end.
    """

    candidate: Candidate
    prediction: Prediction
    data: dict | None = None

    @property
    def fits(self) -> bool:
        """Whether it was compiled and fits."""
        return bool(self.data and self.data.get("memory") and self.data["memory"]["fits"])

    def rank(self, correction: Correction) -> float:
        """Seconds by which ways are compared."""
        if self.fits and self.data["roofline"]:
            return (self.data["roofline"]["step"] + self.data["roofline"]["serial"]) / 2
        return rank(correction.roofline(self.prediction))

    def memory(self, correction: Correction) -> float:
        """Bytes of a device: the compiler's where it has said, else predicted."""
        return self.data["memory"]["total"] if self.fits else correction.memory(self.prediction)


def rank(roofline: Roofline) -> float:
    """The mean of a step's time with everything and with nothing overlapped."""
    return (roofline.step + roofline.serial) / 2


@dataclasses.dataclass
class Found:
    """What a search has found.

    Attributes:
        ways: all that were predicted, the most promising first.
        low: by (remat of the decoder, of towers), by how much predictions of temporaries were low; None is any.
        bounds: by (remat, remat of towers, axes of the mesh), by how much bounds of time were off, for each compiled.
        seconds: that the search took.
        experiment, target: what was searched for.
        room: the share of the memory that a prediction may take to be worth compiling.
    """

    experiment: Experiment
    target: Target
    ways: list[Tried]
    low: dict[Any, float] = dataclasses.field(default_factory=dict)
    bounds: dict[Any, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    room: float = ROOM

    def correction(self, way: Tried) -> Correction:
        """The error of predictions: of memory from ways with the same remat, or from any; of time from ways whose mesh
        has the same axes too, for what one kind of mesh costs says nothing of another."""
        remat, of_mesh = _kinds(way.candidate)
        low = self.low.get(remat, self.low.get(None, LOW))
        seen = self.bounds.get((*remat, of_mesh), [])
        return Correction(low, {name: _mean([one[name] for one in seen if name in one]) for name in BOUNDS})

    def rank(self, way: Tried) -> float:
        """Seconds by which it is compared."""
        return way.rank(self.correction(way))

    def memory(self, way: Tried) -> float:
        """Bytes of a device."""
        return way.memory(self.correction(way))

    @property
    def compiled(self) -> list[Tried]:
        """Those that were compiled, the fastest that fit first."""
        return sorted((way for way in self.ways if way.data), key=lambda way: (not way.fits, self.rank(way)))

    @property
    def best(self) -> Tried | None:
        """The fastest that was compiled and fits."""
        return next((way for way in self.compiled if way.fits), None)

    def has(self, enough: int | None) -> bool:
        """Whether so many that were compiled fit."""
        return enough is not None and sum(way.fits for way in self.ways) >= enough

    def next(self) -> Tried | None:
        """The most promising of those that are not compiled, if any can beat the best; first of all one that fits."""
        limit = self.room * self.target.usable
        open_ = [way for way in self.ways if way.data is None]
        within = [way for way in open_ if self.memory(way) <= limit]
        if (best := self.best) is None:  # which looks at all ways
            return min(within, key=self.rank, default=None) or min(open_, key=self.memory, default=None)
        way = min(within, key=self.rank, default=None)
        return way if way and self.rank(way) < 0.995 * self.rank(best) else None

    def learn(self, way: Tried) -> None:
        """Takes what the compiler said of a way."""
        data, prediction = way.data, way.prediction
        remat, of_mesh = _kinds(way.candidate)
        if memory := data.get("memory"):
            temporaries = memory["temporaries"] + memory["padding"] + memory["output"] + memory["program"]
            low = temporaries / prediction.temporaries
        else:
            said = data.get("exhausted") or {}
            needed = said.get("temporaries") or (said.get("all") or 0) - prediction.state
            least = self.target.usable - prediction.state  # it was more than that
            low = max(needed, 1.05 * least, 0) / prediction.temporaries
        self.low[remat] = self.low[None] = low
        if roofline := data.get("roofline"):
            pairs = {name: (roofline[name], getattr(prediction.roofline, name)) for name in BOUNDS}
            errors = {name: real / guess for name, (real, guess) in pairs.items() if real and guess}
            self.bounds.setdefault((*remat, of_mesh), []).append(errors)


def _kinds(candidate: Candidate) -> tuple[tuple, tuple]:
    """(remat of the decoder and of towers, the axes of the mesh and what else is split over them)."""
    mesh = candidate.mesh
    axes = tuple(axis for axis in AXES if getattr(mesh, axis) > 1)
    return (candidate.remat, candidate.towers), (*axes, *mesh.rules["features"])


def _mean(factors: list[float]) -> float:
    """The geometric mean; 1 of none."""
    return math.exp(sum(map(math.log, factors)) / len(factors)) if factors else 1.0


def search(
    experiment: Experiment,
    target: Target,
    seconds: float,
    callback: Callable[[str], None],
    at_once: int = 2,
    enough: int | None = None,
    room: float = ROOM,
) -> Found:
    """Searches within a time limit.

    Args:
        experiment: the experiment; its batch and model are not changed.
        target: the devices.
        seconds: time limit; running compilations are stopped when it is over.
        callback: receives lines of progress.
        at_once: number of concurrent compilations.
        enough: stop when this many compiled ways fit; None: continue while a better one is possible.
        room: the share of the memory that a prediction may take to be worth compiling. The compiler is quick where
            there is room.

    Raises:
        UserError: nothing can be divided over these devices, or no times are known of them.
    """
    if target.peak is None:
        raise UserError(
            f"--search compares times, and --on {target.name} has none: plan for a TPU or a GPU, or leave --search out"
        )
    begin = time.monotonic()
    target.prepare()
    known = facts(experiment, target)
    found = Found(experiment, target, _predicted(experiment, known, target), room=room)
    if not found.ways:
        rows = f"data.batch_size is {experiment.data.batch_size}"
        raise UserError(f"--search: {rows}, and no mesh of {target.count} devices divides that: change it")
    found.ways.sort(key=found.rank)
    fit = sum(found.memory(way) <= room * target.usable for way in found.ways)
    share = "" if room == ROOM else f" into {room:.0%} of the memory"
    callback(f"{len(found.ways)} ways to run, {fit} of them predicted to fit{share}; compiling the most promising")

    def left() -> float:
        return seconds - (time.monotonic() - begin)

    running: dict[concurrent.futures.Future, Tried] = {}
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while True:
            while len(running) < at_once and left() > 20 and not found.has(enough) and (way := found.next()):
                callback(f"compiling {way.candidate.about()}: {_figures(found, way)} predicted")
                way.data = {"failed": "compiling"}
                limit = min(left(), max(120.0, seconds / 2))
                running[pool.submit(_compiled, experiment, target, way, limit)] = way
            if not running:
                break
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                way = running.pop(future)
                way.data = future.result()
                if "failed" not in way.data:
                    found.learn(way)
                callback(f"  {_outcome(found, way)} ({seconds - left():.0f} s)")
    found.ways.sort(key=found.rank)
    found.seconds = time.monotonic() - begin
    return found


def nearest(
    experiment: Experiment, target: Target, data: dict, seconds: float, callback: Callable[[str], None]
) -> list[dict]:
    """The three nearest changes that make an experiment fit whose program did not.

    Of each set of kinds (mesh, remat, microbatches; rows) the fastest that is predicted to fit is compiled, smallest
    sets first, and where it does not fit the next; what there was no time for is marked as predicted.

    Args:
        experiment: as it stands.
        target: the devices.
        data: its plan, as JSON data, with what the compiler said.
        seconds: for compiling.
        callback: receives lines of progress.
    """
    begin = time.monotonic()
    known, mesh, found = facts(experiment, target), data["settings"]["mesh"], Found(experiment, target, [])
    every = math.prod(mesh.values()) == target.count  # and not one device of many
    now = current(experiment, target.count, mesh if every else None)
    if every and (here := _predict(experiment, known, target, now)):
        found.learn(Tried(now, here, data))
    answers: list[dict] = []
    for kinds, chain in sorted(smaller(now).items(), key=lambda item: len(item[0])):
        ways = [Tried(way, guess) for way in chain if (guess := _predict(experiment, known, target, way))]
        for _ in range(TRIES):
            within = [way for way in ways if way.data is None and found.memory(way) <= ROOM * target.usable]
            if not within:
                break
            way = min(within, key=found.rank if target.peak else found.memory)
            left = seconds - (time.monotonic() - begin)
            if left > 20:
                callback(f"compiling {way.candidate.about()}: {_figures(found, way)} predicted")
                way.data = _compiled(experiment, target, way, left)
                callback(f"  {_outcome(found, way)}")
                if "failed" in way.data:
                    continue
                found.learn(way)
            if way.data is None or way.fits:
                answer = {"change": list(kinds), "overrides": way.candidate.overrides(experiment), "compiled": way.fits}
                answers.append(answer | {"memory": found.memory(way), "usable": target.usable})
                break
        if len(answers) == 3:
            break
    return answers


def _compiled(experiment: Experiment, target: Target, way: Tried, limit: float) -> dict:
    try:
        return plan_apart(way.candidate.apply(experiment), target, limit)
    except UserError as error:
        return {"failed": str(error)}


def _predicted(experiment: Experiment, known: Facts, target: Target) -> list[Tried]:
    """All ways, in no order. What they share is worked out once: there may be tens of thousands."""
    applied: dict[tuple, Experiment] = {}
    ways, mesh, of_mesh = [], None, None
    for way in candidates(experiment, target):
        if way.mesh is not mesh:
            mesh, of_mesh = way.mesh, arranged(way.mesh, known)
        if of_mesh is None:
            continue
        without = way.remat, way.towers, way.microbatches  # arithmetic takes the mesh from `here`
        if without not in applied:
            applied[without] = way.apply(experiment)
        here = dataclasses.replace(of_mesh, schedule=way.schedule) if way.schedule else of_mesh
        ways.append(Tried(way, predict(applied[without], known, target, here)))
    return ways


def _predict(experiment: Experiment, known: Facts, target: Target, way: Candidate) -> Prediction | None:
    here = arranged(way.piped, known)
    return here and predict(way.apply(experiment), known, target, here)


def _figures(found: Found, way: Tried) -> str:
    return f"{found.memory(way) / 2**30:.1f} GiB, {found.rank(way):.3g} s"


def _outcome(found: Found, way: Tried) -> str:
    if way.fits:
        ceiling = f", MFU ceiling {way.data['roofline']['mfu_ceiling']:.1%}" if way.data["roofline"] else ""
        return f"fits: {_figures(found, way)}{ceiling}: {way.candidate.about()}"
    reason = way.data.get("failed") or "does not fit"
    return f"{reason}: {way.candidate.about()}"
