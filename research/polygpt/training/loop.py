"""The training loop: data in, steps, metrics, evaluations and checkpoints out.

A run repeats itself to the bit wherever it is cut: every figure in metrics.jsonl is a function of the state and the
data, and a checkpoint holds both, with the data iterator as it was right after the batch of its step.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from polygpt import sequence, spec
from polygpt.data.loader import train_batches
from polygpt.errors import UserError
from polygpt.evaluation.evaluate import evaluate
from polygpt.training.checkpoint import Checkpoints
from polygpt.training.compilation import enable_cache
from polygpt.training.example_log import example_log
from polygpt.training.experiment import Experiment
from polygpt.training.interruption import Interruption
from polygpt.training.prefetch import Fed, Prefetch
from polygpt.training.program import Program, assemble
from polygpt.training.sinks import JsonLines, Sink, TensorBoard, Terminal
from polygpt.training.workdir import claim, require_same, storage_faults


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        step: batches consumed.
        finished: False if a signal ended it early; the same call goes on from there.
        skipped: records left out of the data, by reason.
    """

    step: int
    finished: bool
    skipped: dict[str, int]


@dataclasses.dataclass
class Standing:
    """The best metric so far and how many evaluations ago it was."""

    best: float | None = None
    stale: int = 0

    def update(self, metric: float, better: str) -> bool:
        """Takes a new metric; True if it is the best."""
        sign = 1 if better == "lower" else -1
        improved = math.isfinite(metric) and (self.best is None or sign * metric < sign * self.best)
        self.best, self.stale = (metric, 0) if improved else (self.best, self.stale + 1)
        return improved


def train(experiment: Experiment, workdir: str | Path, sinks: Callable[[Path, int, int], list[Sink]] | None = None):
    """Trains, or goes on where the last call with this folder ended, was stopped or was killed.

    Args:
        experiment: what to do.
        workdir: the run folder; made if it does not exist.
        sinks: from (workdir, step begun from, steps) to the sinks; by default terminal, JSON lines and TensorBoard.

    Returns:
        An Outcome.

    Raises:
        UserError: if the folder is another experiment's, data or settings are at fault, the disk is full, or too many
            steps in a row were not finite.
    """
    workdir = Path(workdir).absolute()
    enable_cache()
    with storage_faults(workdir), contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        require_same(workdir, experiment)
        return _Trainer(experiment, workdir, sinks or default_sinks, interruption, stack).run()


def default_sinks(workdir: Path, step: int, steps: int) -> list[Sink]:
    """Those of the command line; only the first process has any."""
    if jax.process_index() > 0:
        return []
    return [Terminal(step, steps), JsonLines(workdir, step), TensorBoard(workdir, step)]


class _Trainer:
    def __init__(self, experiment: Experiment, workdir: Path, sinks, interruption: Interruption, stack):
        self.experiment, self.spec, self.workdir, self.interruption = (
            experiment,
            experiment.train,
            workdir,
            interruption,
        )
        self.tokenizer = experiment.tokenizer.build()
        program = assemble(experiment, self.tokenizer.vocabulary)
        self.model, self.parallel, self.step = program.model, program.parallel, program.step
        self.all_finite = jax.jit(
            lambda params: jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
        )
        batches = train_batches(
            experiment.data,
            self.tokenizer,
            experiment.model.adapters,
            seed=experiment.seed,
            feeder=self.parallel.feeder,
            feeders=self.parallel.feeders,
        )
        claim(workdir, experiment)  # not before: a setting or a source that is at fault leaves no folder behind
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.spec.checkpoint, self.spec.better)
        stack.callback(self.checkpoints.close)
        restored = self.checkpoints.restore(self.parallel.abstract(program.initial))
        self.standing = Standing()
        self.metric: float | None = None  # of the last step, if it was evaluated
        if restored is None:
            self.state = self.parallel.create(program.initial)
        else:
            self.state, data = restored
            batches.set_state(data["batches"])
            self.standing = Standing(**data["standing"])
        self.done = self.saved = int(self.state.step)
        self.place = batches.get_state()  # in the data, after the last batch consumed: the prefetch thread is ahead
        self._announce(program)
        self.sinks = sinks(workdir, self.done, self.spec.steps)
        self.example_log = example_log(workdir, self.parallel, self.done) if experiment.data.log_examples else None
        if self.example_log:
            self.sinks.append(self.example_log)
        for sink in self.sinks:
            stack.callback(sink.close)
        self.feed = Prefetch(batches, self.parallel.put, self._check, self.spec.prefetch)
        stack.callback(self.feed.close)
        self.pending: tuple[int, Fed, dict[str, jax.Array]] | None = None
        self._begin, self._steps, self._tokens, self._waited = None, 0, 0, 0.0

    def run(self) -> Outcome:
        while self.done < self.spec.steps and not self._out_of_patience() and not self.interruption.requested:
            fed = next(self.feed)
            with jax.transfer_guard("disallow"):  # what the step needs is on the device: anything else is a mistake
                self.state, metrics = self.step(self.state, fed.batch)
            self._settle()  # the step before this one, while this one computes
            self.done += 1
            self.pending, self.place, self.metric = (self.done, fed, metrics), fed.state, None
            last = self.done == self.spec.steps
            evaluating = self.spec.evaluate_every and (last or self.done % self.spec.evaluate_every == 0)
            saving = self.done % self.spec.checkpoint.every == 0
            if evaluating or saving:
                self._settle()
                improved = evaluating and self._evaluate()
                if saving or improved:
                    self._save()
                self._restart_clock()
        self._settle()
        if self.saved < self.done:  # however the loop ended: a signal may come at any point of it
            self._save()
        self.checkpoints.wait()
        skipped = dict(self.place["skipped"])
        if skipped:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
            print(f"records left out: {counts}", file=sys.stderr)
        finished = self.done >= self.spec.steps or self._out_of_patience()
        return Outcome(self.done, finished, skipped)

    def _settle(self) -> None:
        """Fetches the metrics of the pending step and gives them to the sinks."""
        if self.pending is None:
            return
        (step, fed, metrics), self.pending = self.pending, None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if self.example_log:
            self.example_log.examples(step, fed.examples)
        if self._begin is None:  # the first step of this process: mostly compilation, and not counted
            self._restart_clock()
        else:
            self._tokens += fed.tokens * self.parallel.feeders
            self._waited += fed.waited
            self._steps += 1
        if step % self.spec.log_every == 0 or step == self.spec.steps:
            self._tell("metrics", step, metrics)
            if self._steps > 0:
                seconds = time.perf_counter() - self._begin
                timing = {
                    "seconds": seconds / self._steps,
                    "tokens_per_second": self._tokens / seconds,
                    "input_wait": self._waited / seconds,
                }
                self._tell("timing", step, timing)
            self._restart_clock()
        self._tell("step", step, metrics["loss"])
        if metrics["skipped_in_row"] >= self.spec.max_nonfinite:
            self.checkpoints.wait()
            kept = max(self.checkpoints.finite_steps(), default=None)
            raise UserError(
                f"step {step}: loss, gradient or update was not finite {self.spec.max_nonfinite} times in a row; "
                + ("there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is intact")
                + ": lower the learning rate or look at the data (train.max_nonfinite sets this limit)"
            )

    def _evaluate(self) -> bool:
        """Measures the run's metric; True if it is the best so far. An error leaves a checkpoint of this step."""
        try:
            self.metric = self._measure()
        except Exception:
            self._save()
            raise
        return self.standing.update(self.metric, self.spec.better)

    def _measure(self) -> float:
        experiment, plan = self.experiment, self.experiment.evaluation
        if self.spec.evaluate == "loss":
            plan = plan.replace(
                modality_gain=False, tasks={name: task.replace(generate=False) for name, task in plan.tasks.items()}
            )
        params = jax.device_put(self.state.averaged, jax.local_devices()[0])
        results = evaluate(self.model, params, self.tokenizer, experiment.model.adapters, experiment.data.layout, plan)
        metric = pick(results["tasks"], self.spec.metric)
        self._tell("evaluation", self.done, {"metric": metric, **results})
        return metric

    def _save(self) -> None:
        for sink in self.sinks:
            sink.flush()  # before the checkpoint: what it restores must find its lines
        self.checkpoints.save(
            self.state,
            metric=self.metric,
            finite=bool(self.all_finite((self.state.params, self.state.ema))),
            data={
                "batches": [self.place],
                "standing": dataclasses.asdict(self.standing),
                "config": spec.to_json(self.experiment),
            },
        )
        self.saved = self.done

    def _out_of_patience(self) -> bool:
        return self.spec.patience is not None and self.standing.stale >= self.spec.patience

    def _restart_clock(self) -> None:
        self._begin, self._steps, self._tokens, self._waited = time.perf_counter(), 0, 0, 0.0

    def _tell(self, what: str, step: int, value: Any) -> None:
        for sink in self.sinks:
            getattr(sink, what)(step, value)

    def _check(self, batch: sequence.Batch) -> None:
        sequence.check(batch, self.tokenizer.vocabulary, self.model.positions)

    def _announce(self, program: Program) -> None:
        if jax.process_index() == 0:
            print(program.about(), file=sys.stderr)
            if self.done:
                print(f"goes on from step {self.done} in {self.workdir}", file=sys.stderr)


def pick(tasks: dict[str, dict[str, Any]], metric: str) -> float:
    """The figure of that name: "loss" is the mean over tasks. Raises UserError if it was not measured."""
    if metric == "loss":
        return sum(figures["loss"] for figures in tasks.values()) / len(tasks)
    task, _, measure = metric.rpartition("/")
    if measure not in tasks[task]:
        raise UserError(
            f"train.metric is {metric!r}, and {task} has {', '.join(sorted(tasks[task]))}: "
            "choose one of these, or train.evaluate full"
        )
    return float(tasks[task][measure])
