"""The training loop: reads data, runs steps, writes metrics, evaluations and checkpoints.

Resuming is bit-exact at any step: every value in metrics.jsonl is a function of the state and the data, and a
checkpoint stores both, with the state of the data iterator right after the batch of its step.

Several seeds are trained together by the same loop: their state and metrics only have another axis (`seeds.py`).

With several processes, each runs this loop and all do the same at the same steps, because every decision depends on
global values only. Only process 0 writes metrics.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt import spec
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
from polygpt.training.feed import Feed
from polygpt.training.held_out import MetricState, follow, measure
from polygpt.training.loggers import Logger
from polygpt.training.phases import Phases
from polygpt.training.prefetch import Fed
from polygpt.training.program import Program
from polygpt.training.spikes import Rewinds, Rewound
from polygpt.training.throughput import Throughput
from polygpt.training.workdir import claim


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        step: steps taken.
        finished: False if a signal ended training early; the same call resumes it.
        skipped: records skipped in the data, by reason.
    """

    step: int
    finished: bool
    skipped: dict[str, int]


class Trainer:
    """A run in progress.

    Args:
        experiment: the experiment to train.
        workdir: the run folder.
        loggers: see `loop.train`.
        interruption: signals when to stop early.
        clock: accounts for wall-clock time.
        watchdog: notified of every step.
        stack: closes the resources opened here.
        seeds: see `loop.train`.
        on_message: shows a message in process 0.
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
        seeds: Sequence[int],
        on_message: Callable[[str], None],
    ):
        self.experiment, self.spec, self.workdir = experiment, experiment.train, workdir
        self.interruption, self.goodput, self.watchdog = interruption, clock, watchdog
        self.on_message = on_message
        self.tokenizer = experiment.tokenizer.build()
        self.phases = Phases(experiment, self.tokenizer.vocabulary, seeds)
        self.program = self.phases.programs[0]  # of the phase that is current
        self.parallel = self.program.parallel
        self.all_finite = jax.jit(
            lambda params: jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
        )
        self.feed = Feed(self.program, self.tokenizer)
        data_shards.require_same_data(self.feed.place["examples"], experiment.evaluation)
        require_prompts(experiment.evaluation)
        resuming.require_start(self.phases.programs, workdir)
        claim(workdir, experiment, stack)  # last, so that invalid settings or sources leave no folder behind
        self.goodput.open()
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.spec.checkpoint, self.spec.better)
        stack.callback(self.checkpoints.close)
        self.metric: float | None = None  # of the last step, if it was evaluated
        self.step: Callable | None = None  # compiled for the first batch
        self.rewinds = Rewinds(None if seeds else self.spec.spikes)
        if (data := self._restore()) is not None:
            self.feed.restore(data["batches"])
            self.rewinds.totals = Rewound(**data.get("rewound", {}))
        first = jax.process_index() == 0
        if first:
            lines = [self.phases.summary(), *resuming.lost_steps(workdir, self.done, self.spec.checkpoint)]
            if data is None:
                lines += resuming.started(workdir, self.program.start)
            elif self.done:
                lines += resuming.resume_messages(experiment, workdir, self.done, self._finished(), data["config"])
            on_message("\n".join(lines))
        self.loggers = loggers(workdir, self.done, self.spec.steps) if first else []
        self.example_log = example_log(workdir, self.parallel, self.done) if experiment.data.log_examples else None
        if self.example_log:
            self.loggers.append(self.example_log)
        for logger in self.loggers:
            stack.callback(logger.close)
        self.feed.start()
        stack.callback(self.feed.close)
        self.pending: tuple[int, Fed, dict[str, jax.Array]] | None = None
        self.periodic = Periodic(self.spec.checkpoint.every_minutes)
        self.begun = 0  # steps and evaluation batches that this process has dispatched to its devices
        self.throughput = Throughput(self.parallel.data_shards)

    def run(self) -> TrainResult:
        """Trains to the last step, or until stopped."""
        if not self._finished():
            self.goodput.begin(self.done)
            self.watchdog.restart_timer()
            self.goodput.switch("other")
        if self.metric_state.pending:
            self._rerun_evaluation()
        while not self._finished() and not self.interruption.due(self.begun):
            self._advance()
        self._flush_metrics()  # a signal may have ended the loop at any point
        if self.rewinds.due:
            self._rewind()
        if self.saved < self.done:
            self._save()
        with self._doing("checkpoint"):
            self.checkpoints.wait()
        finished = self._finished()
        self.goodput.end(self.done, finished)
        skipped = data_shards.skipped(self.feed.place)
        if skipped:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
            self.on_message(f"records skipped: {counts}")
        return TrainResult(self.done, finished, skipped)

    def _advance(self) -> None:
        """Runs one step and whatever is due after it."""
        self.checkpoints.check()  # other processes may be waiting for this one to write its part
        if (program := self.phases.program(self.done + 1)) is not self.program:
            self._begin_phase(program)
        if not self.feed.ready:
            self._flush_metrics()  # flush first, so that the input wait below is time in which the device is idle
        with self.goodput.track("input_wait"):
            # No process may stop before a step that others have started: they would wait for it.
            fed = self.feed.take(lambda: jax.process_count() == 1 and self.interruption.requested)
        if fed is None:
            return
        if self.step is None:
            self.state = self.phases.carried(self.state, self.done)
        self.throughput.waited(fed.waited)
        doing = self.goodput.track("productive") if self.step else self._compiling()
        with doing, jax.transfer_guard("disallow"):  # all inputs must be on the device already
            if self.step is None:
                self.step = self.program.ready(self.state, fed.batch)
                self.state, metrics = processes.run_first_step(self.step, self.state, fed.batch)
            else:
                self.state, metrics = self.step(self.state, fed.batch)
        self.begun += 1
        self._flush_metrics()  # the previous step, while this one computes
        if self.rewinds.due:  # drop the result of this step, which all processes have started
            return self._rewind()
        self.done += 1
        self.pending, self.feed.place, self.metric = (self.done, fed, metrics), fed.state, None
        last = self.done == self.spec.steps
        evaluating = bool(self.spec.evaluate_every) and (last or self.done % self.spec.evaluate_every == 0)
        self.metric_state.pending = evaluating
        saving = self.done % self.spec.checkpoint.every == 0 or self.periodic.due(self.begun)
        if evaluating or saving or last:
            self._flush_metrics()
            if self.rewinds.due:
                return self._rewind()
            improved = evaluating and self._evaluate()
            if saving or improved:
                self._save()
            self.throughput.restart()

    def _flush_metrics(self) -> None:
        """Fetches the metrics of the pending step and passes them to the loggers."""
        if self.pending is None:
            return
        (step, fed, metrics), self.pending = self.pending, None
        with self.goodput.track("productive"):
            metrics = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        self.throughput.finished(fed)
        self.watchdog.step_finished(step)
        self.rewinds.observe(step, fed.state, metrics)
        if self.example_log:
            self.example_log.examples(step, fed.examples)
        if step % self.spec.log_every == 0 or step == self.spec.steps:
            self._log("metrics", step, metrics)
            if timing := self.throughput.timing():
                self._log("timing", step, timing)
            self.throughput.restart()
        self._log("step", step, metrics["loss"])
        self.goodput.record(step, least=INTERVAL)
        if np.min(metrics["skipped_in_row"]) >= self.spec.max_nonfinite:  # of several seeds, all
            self.checkpoints.wait()
            raise Diverged(resuming.diverged(step, metrics, self.spec.max_nonfinite, self.checkpoints.finite_steps()))

    def _rewind(self) -> None:
        """Goes back to the last checkpoint and continues with the data after the last spike.

        Only checkpoints that were due by `checkpoint.every` count: others, written by time or on a signal, may not
        exist in another run of the same experiment.
        """
        step, place = self.rewinds.begin()
        self.pending = None
        self.goodput.record(step)
        with self._doing("lost"):
            self.feed.close()
            self.state = None  # two states may not fit on the device
            due = (step - 1) // self.spec.checkpoint.every * self.spec.checkpoint.every
            self._restore(before=due + 1)
            self.rewinds.end(int(self.state.window.spikes))
            self.feed.go_on(place)
        self.goodput.rewind(self.done)
        self._log("rewind", self.done, step)
        if self.metric_state.pending:
            self._rerun_evaluation()
        self.throughput.restart()

    def _begin_phase(self, program: Program) -> None:
        """Continues with the program of another phase and its data. Its first step takes over the state."""
        with self._doing("other"):
            self.feed.close()
            self._use(program)
            self.feed.go_on(self.feed.place)
        self.throughput.restart()

    def _use(self, program: Program) -> None:
        if program is not self.program:
            self.program, self.step = program, None
            self.feed.follow(program)

    def _evaluate(self) -> bool:
        """Evaluates the run's metric; True if it is the best so far.

        A signal interrupts the evaluation, and the resumed run repeats it. After an error a checkpoint of this step is
        written, unless that needs other processes, which may be stuck.
        """
        try:
            with self._doing("evaluation"):
                self.metric, results = measure(self.program, self.state, self.tokenizer, self._proceed)
        except Interrupted:
            return False
        except Exception:
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):  # report the evaluation's error instead
                    self._save()
            raise
        self._log("evaluation", self.done, {"metric": self.metric, **results})
        self.state, improved = follow(self.spec, self.metric_state, self.metric, self.state)
        return improved

    def _proceed(self) -> None:
        """Called before each evaluation batch. All processes share the batches, except under pmap."""
        if jax.process_count() > 1 and self.program.evaluated.layout is None:
            return
        if self.interruption.due(self.begun):
            raise Interrupted
        self.begun += 1

    def _rerun_evaluation(self) -> None:
        """Reruns the evaluation of this step if a signal interrupted it before the checkpoint was written."""
        known = self.checkpoints.metric(self.done)
        if known is not None:  # already evaluated and logged after this checkpoint was written
            self.state, _ = follow(self.spec, self.metric_state, known, self.state)
            return
        self._evaluate()
        if not self.metric_state.pending:
            with self._doing("checkpoint"):
                for logger in self.loggers:
                    logger.flush()
                self.checkpoints.measured(self.done, self.metric)

    def _save(self) -> None:
        with self._doing("checkpoint"):
            for logger in self.loggers:
                logger.flush()  # before the checkpoint, so that a restored run finds its lines
            self.checkpoints.save(
                self.parallel.as_global_arrays(dataclasses.replace(self.state, references={})),
                metric=self.metric,
                finite=bool(self.all_finite((self.state.params, self.state.ema))),
                data={
                    "batches": data_shards.gather_positions(self.feed.place),
                    "standing": dataclasses.asdict(self.metric_state),
                    "rewound": dataclasses.asdict(self.rewinds.totals),
                    "config": spec.to_json(self.experiment),
                    "references": self.program.origins,
                },
            )
        self.saved = self.done
        self.periodic.restart()
        self.goodput.record(self.done)

    def _restore(self, before: int | None = None) -> dict[str, Any] | None:
        """Restores the last checkpoint and returns its data; without a checkpoint, creates the initial state."""
        first = self.phases.programs[0]
        state, data = self.checkpoints.restore(self.phases.target, first.initial, before) or (None, None)
        self.state = first.resumed(state, data.get("references", {})) if data else first.first_state()
        self.metric_state = MetricState.restored(data["standing"]) if data else MetricState()
        self.done = self.saved = int(self.state.step)
        self._use(self.phases.program(self.done))
        return data

    def _finished(self) -> bool:
        out_of_patience = self.spec.patience is not None and self.metric_state.stale >= self.spec.patience
        return (self.done >= self.spec.steps or out_of_patience) and not self.metric_state.pending

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Tells the watchdog that no step will finish meanwhile."""
        with self.goodput.track(what):
            yield
            self.watchdog.restart_timer()

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Reports the compilation of the process's first step, which may take minutes."""
        begin = self.goodput.now()
        self._log("compiling", self.done + 1, None)
        with self._doing("compile"):
            yield
        self.periodic.restart()  # there is nothing to lose yet
        self._log("compiling", self.done + 1, self.goodput.now() - begin)

    def _log(self, what: str, step: int, value: Any) -> None:
        for logger in self.loggers:
            getattr(logger, what)(step, value)
