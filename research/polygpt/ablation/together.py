"""All seeds of a point in one program: the training step, vmapped over seeds.

A seed's results equal those of a separate run (`training/loop.py`) up to rounding: initial parameters, dropout, the
order of examples and augmentation derive from the seed in the same way, and seeds do not interact. A group of seeds
saves its state to its folder at intervals; killed and restarted, it gives bit-identical results.
"""

import dataclasses
import json
import logging
import math
import time
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt import sequence
from polygpt.ablation import stacked
from polygpt.ablation.engines.base import Callback, Progress, Task
from polygpt.ablation.record import record
from polygpt.data.layout import MediaCache
from polygpt.data.loader import train_batches
from polygpt.evaluation.evaluate import evaluate
from polygpt.files import write_atomically
from polygpt.runtime.compilation import enable_cache
from polygpt.runtime.interruption import Interruption
from polygpt.runtime.storage import storage_faults
from polygpt.scale.plan.memory import exhausted
from polygpt.sequence import Batch
from polygpt.training import held_out
from polygpt.training.experiment import Experiment
from polygpt.training.prefetch import Prefetch
from polygpt.training.program import assemble

SAVE_EVERY = 20.0
"""Seconds between saves, or ten times the duration of a save, if that is more."""
STATE, RECORDS = "state.npz", "records.json"
"""Files in a group's folder: state while it trains, records at the end."""

log = logging.getLogger(__name__)


def reason_against(experiment: Experiment) -> str | None:
    """Why the seeds of an experiment cannot be trained together; None if they can."""
    train = experiment.train
    if train.parallel not in ("single", "auto"):
        return f"train.parallel is {train.parallel!r}: one seed uses several devices"
    if train.patience is not None:
        return "train.patience ends the runs of different seeds at different steps"
    if train.spikes is not None and train.spikes.action == "rewind":
        return "train.spikes.action is 'rewind', and seeds would rewind independently"
    if train.parallel == "auto" and jax.device_count() > 1 and stacked.fitting(experiment) < 1:
        return "train.parallel is 'auto', and one seed needs more than one device's memory"
    return None


def run(task: Task, callback: Callback) -> list[dict[str, Any]]:
    """The records of a task's runs. If all seeds do not fit into memory together, trains them in smaller groups.

    Raises:
        UserError: data or settings are invalid, or the disk is full.
        KeyboardInterrupt: a signal asked to stop; the state is saved.
    """
    enable_cache()
    with storage_faults(task.folder):
        return _in_groups(task, list(task.experiments), stacked.most(task.experiments[0]), callback)


def _in_groups(task: Task, experiments: list[Experiment], most: int, callback: Callback) -> list[dict[str, Any]]:
    records = []
    for part in np.array_split(np.arange(len(experiments)), math.ceil(len(experiments) / most)):
        some = [experiments[i] for i in part]
        try:
            records += _Group(task, some, callback).run()
        except jax.errors.JaxRuntimeError as error:
            if exhausted(error) is None or len(some) == 1:
                raise
            log.warning("%s: %d seeds do not fit into memory together: trying half as many", task.name, len(some))
            records += _in_groups(task, some, math.ceil(len(some) / 2), callback)
    return records


@dataclasses.dataclass
class Course:
    """Host-side record of a group.

    Attributes:
        done: steps taken.
        losses: float32 [seeds, steps]; NaN for steps not taken yet.
        stopped: per seed, the step at which it was stopped, or None.
        evaluations: (step, measures of the tasks per seed); {} for stopped seeds.
        seconds: time so far.
    """

    done: int
    losses: np.ndarray
    stopped: list[int | None]
    evaluations: list[tuple[int, list[dict[str, Any]]]]
    seconds: float = 0.0


class _Group:
    """Seeds in training."""

    def __init__(self, task: Task, experiments: Sequence[Experiment], callback: Callback):
        self.name, self.experiments, self.callback = task.name, experiments, callback
        self.experiment, self.seeds = experiments[0], tuple(experiment.seed for experiment in experiments)
        self.folder = task.folder / "-".join(["seeds", *map(str, dict.fromkeys((self.seeds[0], self.seeds[-1])))])

    def run(self) -> list[dict[str, Any]]:
        """Trains and evaluates all seeds, or reads their records."""
        if (self.folder / RECORDS).exists():
            return json.loads((self.folder / RECORDS).read_text(encoding="utf-8"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begun = time.monotonic()
        self.tokenizer = self.experiment.tokenizer.build()
        self.program = assemble(self.experiment, self.tokenizer.vocabulary, jax.devices()[:1])
        self.cache = MediaCache(self.experiment.data.cache)
        self.streams = self._streams()
        self.pick = jax.jit(lambda tree, index: jax.tree.map(lambda x: x[index], tree))
        self._restore()
        feed = Prefetch(self.streams, self._put, self._check, self.experiment.train.prefetch)
        try:
            with Interruption() as interruption:
                self._train(feed, interruption)
        finally:
            feed.close()
        records = self._records()
        write_atomically(self.folder / RECORDS, json.dumps(records))
        (self.folder / STATE).unlink(missing_ok=True)
        return records

    def _train(self, feed: Prefetch, interruption: Interruption) -> None:
        step, seeds = stacked.over_seeds(self.program), self._seeds()
        spec, course, pending = self.experiment.train, self.course, None
        while course.done < spec.steps and None in course.stopped and not interruption.requested:
            fed = feed.take(lambda: interruption.requested)
            if fed is None:
                break
            self.state, figures = step(self.state, fed.batch, seeds)
            course.done, self.place = course.done + 1, fed.state
            if pending is not None:
                self._flush_losses(*pending)  # the previous step, while this one computes
            pending, last = (course.done, figures), course.done == spec.steps
            evaluating = spec.evaluate_every and course.done % spec.evaluate_every == 0 and not last
            if evaluating or last or time.monotonic() >= self.next_save:
                self._flush_losses(*pending)
                pending = None
                if evaluating:
                    self._evaluate()
                if last or time.monotonic() >= self.next_save:
                    self._save()
        if pending is not None:
            self._flush_losses(*pending)
        if None in course.stopped and course.done < spec.steps:
            self._save()
            raise KeyboardInterrupt(f"{self.name}: saved at step {course.done}")
        if None in course.stopped:
            self._evaluate()

    def _flush_losses(self, step: int, figures: jax.Array) -> None:
        """Records the losses of a step."""
        losses, in_row = np.asarray(figures)
        self.course.losses[:, step - 1] = losses
        for i, count in enumerate(in_row):
            if self.course.stopped[i] is None and count >= self.experiment.train.max_nonfinite:
                self.course.stopped[i] = step
        self.callback(Progress(self.name, self.seeds, step, self.experiment.train.steps, tuple(map(float, losses))))

    def _evaluate(self) -> None:
        """Evaluates all seeds that were not stopped; compiles the program once."""
        experiment, plan = self.experiment, held_out.plan(self.experiment)
        if not plan.tasks or self.course.evaluations and self.course.evaluations[-1][0] == self.course.done:
            return
        given = self.tokenizer, experiment.model.adapters, experiment.data.layout, plan
        tasks = []
        for i, stopped in enumerate(self.course.stopped):
            params = self.pick(self.state.eval_params, i)
            tasks.append({} if stopped else evaluate(self.program.evaluated, params, *given, cache=self.cache)["tasks"])
        self.course.evaluations.append((self.course.done, tasks))

    def _records(self) -> list[dict[str, Any]]:
        course, seconds = self.course, self._seconds() / len(self.seeds)
        how = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''} in one program"
        return [
            record(
                experiment,
                course.losses[i, : course.stopped[i] or course.done],
                [(step, tasks[i]) for step, tasks in course.evaluations if tasks[i]],
                stopped=course.stopped[i] is not None,
                seconds=seconds,
                how=how,
            )
            for i, experiment in enumerate(self.experiments)
        ]

    # --- data and state -----------------------------------------------------------------------------------------------

    def _streams(self) -> stacked.Streams:
        data = self.experiment.data
        workers = math.ceil(data.workers / len(self.seeds))  # workers do not affect results
        data, adapters = data.replace(workers=workers), self.experiment.model.adapters
        return stacked.Streams([train_batches(data, self.tokenizer, adapters, seed=seed) for seed in self.seeds])

    def _put(self, batch: Batch) -> Batch:
        return jax.device_put(batch, self.program.parallel.devices[0])

    def _check(self, batch: Batch) -> None:
        for i in range(len(self.seeds)):
            own = jax.tree.map(lambda x, i=i: x[i], batch)
            sequence.check(own, self.tokenizer.vocabulary, self.program.model.positions)

    def _seconds(self) -> float:
        return self.course.seconds + time.monotonic() - self.begun

    def _save(self) -> None:
        begin = time.monotonic()
        course = dataclasses.asdict(self.course) | {"seconds": self._seconds(), "place": self.place}
        stacked.write(self.folder / STATE, self.state, course.pop("losses"), course)
        self.next_save = time.monotonic() + max(SAVE_EVERY, 10 * (time.monotonic() - begin))

    def _restore(self) -> None:
        """Restores the last saved state, or the initial one if there is none or it cannot be used."""
        self.next_save = time.monotonic() + SAVE_EVERY
        try:
            self._read()
            log.warning("%s: resuming at step %d", self.name, self.course.done)
        except FileNotFoundError:
            self._begin()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be read, restarting training: %s", self.folder / STATE, error)
            self.streams = self._streams()
            self._begin()

    def _begin(self) -> None:
        steps, count = self.experiment.train.steps, len(self.seeds)
        self.state = jax.jit(jax.vmap(stacked.initial(self.program)))(self._seeds())
        self.course = Course(0, np.full((count, steps), np.nan, np.float32), [None] * count, [])
        self.place = self.streams.get_state()

    def _read(self) -> None:
        target = jax.eval_shape(jax.vmap(stacked.initial(self.program)), self._seeds())
        device = self.program.parallel.devices[0]
        self.state, losses, course = stacked.read(self.folder / STATE, target, device)
        self.place = course.pop("place")
        self.streams.set_state(self.place)
        self.course = Course(losses=losses, **course)

    def _seeds(self) -> jax.Array:
        return jnp.asarray(self.seeds, jnp.int32)
