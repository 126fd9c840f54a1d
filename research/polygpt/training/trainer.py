"""The training loop: data in, steps, metrics, evaluations and checkpoints out.

A run repeats itself to the bit wherever it is cut: every figure in metrics.jsonl is a function of the state and the
data, and a checkpoint holds both, with the data iterator as it was right after the batch of its step.

Where several processes train, each runs this loop and all do the same at the same steps: what they decide by is global.
The first alone writes figures.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from polygpt import sequence, spec
from polygpt.data.loader import TrainBatches, train_batches
from polygpt.errors import Diverged
from polygpt.evaluation.evaluate import require_prompts
from polygpt.runtime import processes
from polygpt.runtime.checkpoint import Checkpoints
from polygpt.runtime.goodput import INTERVAL, Goodput
from polygpt.runtime.interruption import Interrupted, Interruption
from polygpt.runtime.periodic import Periodic
from polygpt.runtime.watchdog import Watchdog
from polygpt.training import data_shards, resuming
from polygpt.training.example_log import example_log
from polygpt.training.experiment import Experiment
from polygpt.training.held_out import Standing, measure
from polygpt.training.loggers import Logger
from polygpt.training.prefetch import Fed, Prefetch
from polygpt.training.program import assemble
from polygpt.training.spikes import Rewinds, Rewound
from polygpt.training.throughput import Throughput
from polygpt.training.workdir import claim


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        step: steps taken.
        finished: False if a signal ended it early; the same call goes on from there.
        skipped: records left out of the data, by reason.
    """

    step: int
    finished: bool
    skipped: dict[str, int]


class Trainer:
    """A run under way.

    Args:
        experiment: what to do.
        workdir: the run folder.
        loggers: see `loop.train`.
        interruption: tells when to stop early.
        clock: counts where the time goes.
        watchdog: is told of every step.
        stack: closes what is opened here.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        loggers: Callable[[Path, int, int], list[Logger]],
        interruption: Interruption,
        clock: Goodput,
        watchdog: Watchdog,
        stack: contextlib.ExitStack,
    ):
        self.experiment, self.spec, self.workdir = experiment, experiment.train, workdir
        self.interruption, self.goodput, self.watchdog = interruption, clock, watchdog
        self.tokenizer = experiment.tokenizer.build()
        self.program = assemble(experiment, self.tokenizer.vocabulary)
        self.parallel = self.program.parallel
        self.all_finite = jax.jit(
            lambda params: jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
        )
        self.batches = self._train_batches()
        data_shards.require_same_data(self.batches.get_state()["examples"], experiment.evaluation)
        require_prompts(experiment.evaluation)
        claim(workdir, experiment, stack)  # not before: a setting or a source that is at fault leaves no folder behind
        self.goodput.open()
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.spec.checkpoint, self.spec.better)
        stack.callback(self.checkpoints.close)
        self.metric: float | None = None  # of the last step, if it was evaluated
        self.rewinds = Rewinds(self.spec.spikes)
        if (data := self._restore()) is not None:
            self.batches.set_state(data["batches"])
            self.rewinds = Rewinds(self.spec.spikes, Rewound(**data.get("rewound", {})))
        self.place = self.batches.get_state()  # after the last batch consumed: the prefetch thread is ahead
        first = jax.process_index() == 0
        if first:
            print(self.program.about(), file=sys.stderr)
            for line in resuming.lost(workdir, self.done, self.spec.checkpoint):
                print(line, file=sys.stderr)
            if data is not None and self.done:
                given = workdir, self.done, self._finished(), data["config"]
                print(*resuming.about(experiment, *given), sep="\n", file=sys.stderr)
        self.loggers = loggers(workdir, self.done, self.spec.steps) if first else []
        self.example_log = example_log(workdir, self.parallel, self.done) if experiment.data.log_examples else None
        if self.example_log:
            self.loggers.append(self.example_log)
        for logger in self.loggers:
            stack.callback(logger.close)
        self.checked = False  # whether a batch was, in full
        self.feed = self._prefetch()
        stack.callback(lambda: self.feed.close())
        self.pending: tuple[int, Fed, dict[str, jax.Array]] | None = None
        self.step: Callable | None = None  # compiled, once there is a batch to compile it for
        self.periodic = Periodic(self.spec.checkpoint.every_minutes)
        self.begun = 0  # steps that this process has sent to its devices, and batches of evaluations
        self.throughput = Throughput(self.parallel.data_shards)

    def run(self) -> Outcome:
        """Trains up to the last step, or until it is stopped."""
        if not self._finished():
            self.goodput.begin(self.done)
            self.watchdog.rest()
            self.goodput.switch("other")
        if self.standing.owed:
            self._make_up()
        while not self._finished() and not self.interruption.due(self.begun):
            self._advance()
        self._settle()  # however the loop ended: a signal may come at any point of it
        if self.rewinds.due:
            self._rewind()
        if self.saved < self.done:
            self._save()
        with self._doing("checkpoint"):
            self.checkpoints.wait()
        finished = self._finished()
        self.goodput.end(self.done, finished)
        skipped = data_shards.skipped(self.place)
        if skipped and jax.process_index() == 0:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
            print(f"records left out: {counts}", file=sys.stderr)
        return Outcome(self.done, finished, skipped)

    def _advance(self) -> None:
        """A step, and what is due after it."""
        self.checkpoints.check()  # others may wait for this process to have written its part
        if not self.feed.ready:
            self._settle()  # first what the device is at: what is waited for input is then time in which it idles
        with self.goodput.doing("input_wait"):
            # Of several processes none can end before a step that others have begun: they would wait for it.
            fed = self.feed.take(lambda: jax.process_count() == 1 and self.interruption.requested)
        if fed is None:
            return
        self.throughput.waited(fed.waited)
        doing = self.goodput.doing("productive") if self.step else self._compiling()
        with doing, jax.transfer_guard("disallow"):  # what the step needs is on the device: else there is a mistake
            if self.step is None:
                self.step = self.program.ready(self.state, fed.batch)
                self.state, metrics = processes.first_exchange(self.step, self.state, fed.batch)
            else:
                self.state, metrics = self.step(self.state, fed.batch)
        self.begun += 1
        self._settle()  # the step before this one, while this one computes
        if self.rewinds.due:  # this one's result is dropped, and all processes have begun it
            return self._rewind()
        self.done += 1
        self.pending, self.place, self.metric = (self.done, fed, metrics), fed.state, None
        last = self.done == self.spec.steps
        evaluating = bool(self.spec.evaluate_every) and (last or self.done % self.spec.evaluate_every == 0)
        self.standing.owed = evaluating
        saving = self.done % self.spec.checkpoint.every == 0 or self.periodic.due(self.begun)
        if evaluating or saving or last:
            self._settle()
            if self.rewinds.due:
                return self._rewind()
            improved = evaluating and self._evaluate()
            if saving or improved:
                self._save()
            self.throughput.restart()

    def _settle(self) -> None:
        """Fetches the metrics of the pending step and gives them to the loggers."""
        if self.pending is None:
            return
        (step, fed, metrics), self.pending = self.pending, None
        with self.goodput.doing("productive"):
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.throughput.finished(fed)
        self.watchdog.finished(step)
        self.rewinds.see(step, fed.state, metrics)
        if self.example_log:
            self.example_log.examples(step, fed.examples)
        if step % self.spec.log_every == 0 or step == self.spec.steps:
            self._tell("metrics", step, metrics)
            if timing := self.throughput.timing():
                self._tell("timing", step, timing)
            self.throughput.restart()
        self._tell("step", step, metrics["loss"])
        self.goodput.record(step, least=INTERVAL)
        if metrics["skipped_in_row"] >= self.spec.max_nonfinite:
            self.checkpoints.wait()
            kept = max(self.checkpoints.finite_steps(), default=None)
            raise Diverged(
                f"step {step}: loss, gradient or update was not finite {self.spec.max_nonfinite} times in a row; "
                + ("there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is intact")
                + ": lower the learning rate or look at the data (train.max_nonfinite sets this limit)"
            )

    def _rewind(self) -> None:
        """Back to the last checkpoint, and on with the data after the last spike.

        Only to one that was due by `checkpoint.every`: one that a signal or the clock left may not be there in another
        run of the same experiment.
        """
        step, place = self.rewinds.begin()
        self.pending = None
        self.goodput.record(step)
        with self._doing("lost"):
            if not self.feed.close():  # its thread still reads: what it then draws is nobody's
                self.batches = self._train_batches()
            self.state = None  # the device may not hold two
            due = (step - 1) // self.spec.checkpoint.every * self.spec.checkpoint.every
            self._restore(before=due + 1)
            self.rewinds.end(int(self.state.window.spikes))
            self.batches.set_state(data_shards.everywhere(place))
            self.place, self.feed = place, self._prefetch()
        self.goodput.back(self.done)
        self._tell("rewind", self.done, step)
        if self.standing.owed:
            self._make_up()
        self.throughput.restart()

    def _evaluate(self) -> bool:
        """Measures the run's metric; True if it is the best so far.

        A signal ends it, and whoever goes on with the run makes up for it. An error leaves a checkpoint of this step,
        unless other processes would have to take part: they may be stuck.
        """
        try:
            with self._doing("evaluation"):
                self.metric, results = measure(self.program, self.state, self.tokenizer, self._proceed)
        except Interrupted:
            return False
        except Exception:
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):  # the error of the evaluation is the one to know of
                    self._save()
            raise
        self._tell("evaluation", self.done, {"metric": self.metric, **results})
        return self.standing.update(self.metric, self.spec.better)

    def _proceed(self) -> None:
        """Before each batch of an evaluation, in which all processes take part; under pmap each has its own."""
        if jax.process_count() > 1 and self.program.evaluated.layout is None:
            return
        if self.interruption.due(self.begun):
            raise Interrupted
        self.begun += 1

    def _make_up(self) -> None:
        """For the evaluation that the signal ended which left the checkpoint of this step."""
        known = self.checkpoints.metric(self.done)
        if known is not None:  # it was done and told since: it is this checkpoint's data that do not know
            self.standing.update(known, self.spec.better)
            return
        self._evaluate()
        if not self.standing.owed:
            with self._doing("checkpoint"):
                for logger in self.loggers:
                    logger.flush()
                self.checkpoints.measured(self.done, self.metric)

    def _save(self) -> None:
        with self._doing("checkpoint"):
            for logger in self.loggers:
                logger.flush()  # before the checkpoint: what it restores must find its lines
            self.checkpoints.save(
                self.parallel.of_all(self.state),
                metric=self.metric,
                finite=bool(self.all_finite((self.state.params, self.state.ema))),
                data={
                    "batches": data_shards.everywhere(self.place),
                    "standing": dataclasses.asdict(self.standing),
                    "rewound": dataclasses.asdict(self.rewinds.undone),
                    "config": spec.to_json(self.experiment),
                },
            )
        self.saved = self.done
        self.periodic.restart()
        self.goodput.record(self.done)

    def _restore(self, before: int | None = None) -> dict[str, Any] | None:
        """Takes the state from the last checkpoint and returns its data; without one, takes the initial state."""
        initial = self.program.initial
        found = self.checkpoints.restore(self.parallel.abstract(initial), initial, before)
        self.state, data = found or (self.parallel.create(initial), None)
        self.standing = Standing(**data["standing"]) if data else Standing()
        self.done = self.saved = int(self.state.step)
        return data

    def _train_batches(self) -> TrainBatches:
        return train_batches(
            self.experiment.data,
            self.tokenizer,
            self.experiment.model.adapters,
            seed=self.experiment.seed,
            data_shard=self.parallel.data_shard,
            data_shards=self.parallel.data_shards,
        )

    def _prefetch(self) -> Prefetch:
        return Prefetch(self.batches, self.parallel.put, self._check, self.spec.prefetch)

    def _finished(self) -> bool:
        return (self.done >= self.spec.steps or self._out_of_patience()) and not self.standing.owed

    def _out_of_patience(self) -> bool:
        return self.spec.patience is not None and self.standing.stale >= self.spec.patience

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Meanwhile no step is expected to finish."""
        with self.goodput.doing(what):
            yield
            self.watchdog.rest()

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """The first step of a process, which may take minutes to compile: said before and after."""
        begin = self.goodput.now()
        self._tell("compiling", self.done + 1, None)
        with self._doing("compile"):
            yield
        self.periodic.restart()  # there is nothing to lose yet
        self._tell("compiling", self.done + 1, self.goodput.now() - begin)

    def _tell(self, what: str, step: int, value: Any) -> None:
        for logger in self.loggers:
            getattr(logger, what)(step, value)

    def _check(self, batch: sequence.Batch) -> None:
        """All of the first batch; of the others the ids, which a device would clip without a word."""
        vocabulary = self.tokenizer.vocabulary
        if not (self.checked and sequence.ids_in_range(batch, vocabulary)):
            sequence.check(batch, vocabulary, self.program.model.positions)
            self.checked = True
