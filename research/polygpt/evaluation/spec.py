"""Specification of an evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from polygpt.data.sources.base import Source
from polygpt.errors import SpecError
from polygpt.evaluation.classification import Classification
from polygpt.evaluation.head_metric import OutputMetric
from polygpt.evaluation.likelihood import MEASURES
from polygpt.evaluation.metric import Measure, Metric
from polygpt.evaluation.preference import PREFERENCE
from polygpt.generation.sampling import GREEDY, Sampling
from polygpt.spec import Spec, nearest


@dataclasses.dataclass(frozen=True)
class EvalTask(Spec):
    """A held-out task."""

    source: Source
    """Source of the examples."""
    limit: int | None = None
    """Maximum number of examples, sampled once with the evaluation's seed; null for all."""
    generate: bool = False
    """Whether to also generate an answer for each example and compare it with the truth by `metrics`."""
    metrics: tuple[Metric, ...] = (Classification(),)
    """Metrics of generated answers."""
    seq_len: int | None = None
    """T, sequence length; null for that of training, `data.layout.seq_len`."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changes to the trained model, by dotted names of model fields: {"decoder.attention": ...}. The trained parameters
    are used, so the changed model must have the same parameter names and shapes."""
    last: int | None = None
    """Number of final targets of each example that count; null for all. Does not affect answers."""
    heads: tuple[OutputMetric, ...] = ()
    """Metrics of the outputs of heads: against labels, or of retrieval."""

    @property
    def as_trained(self) -> bool:
        """Whether conditions equal those of training: same sequence length, no changes, all tokens."""
        return self.seq_len is None and not self.model and self.last is None

    def measures(self) -> dict[str, Measure]:
        """Its measures by name, in table order: those of its metrics, of its heads, then likelihoods."""
        own = (one for metric in (*self.metrics, *self.heads) for one in metric.measures)
        return {one.name: one for one in (*own, *PREFERENCE, *MEASURES)}

    def validate(self):
        self.require(self.limit is None or self.limit >= 1, "limit", "at least 1, or null for all examples")
        self.require(self.seq_len is None or self.seq_len >= 2, "seq_len", "at least 2, or null for that of training")
        self.require(self.last is None or self.last >= 1, "last", "at least 1, or null for all tokens")
        self.require(bool(self.metrics) or not self.generate, "metrics", "at least one metric if answers are generated")


@dataclasses.dataclass(frozen=True)
class EvaluationSpec(Spec):
    """The held-out tasks, and what to measure."""

    tasks: Mapping[str, EvalTask] = dataclasses.field(default_factory=dict)
    """The tasks by name."""
    batch_size: int = 32
    """Batch size of the evaluation."""
    modality_gain: bool = True
    """Whether to measure the modality gain of every task with media: one more pass per modality."""
    resamples: int = 2000
    """Number of bootstrap resamples for the interval of the modality gain."""
    sampling: Sampling = GREEDY
    """Sampling of generated answers."""
    seed: int = 0
    """Seeds the selection of examples under a limit, the shuffling of media, and the bootstrap."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """How to treat unusable examples: raise an error, or skip them and count them as `skipped`."""

    def measures(self) -> dict[str, Measure]:
        """The measures of all tasks by name, in table order; likelihoods last."""
        found = {name: one for task in self.tasks.values() for name, one in task.measures().items()}
        likelihoods = {one.name: one for one in MEASURES}
        return {name: one for name, one in found.items() if name not in likelihoods} | likelihoods

    def measure(self, metric: str, answers: bool = True) -> Measure:
        """The measure named "task/measure". Values that the task's metrics do not declare have no direction.

        Args:
            metric: "text/loss".
            answers: whether answers are generated for tasks that request them.

        Raises:
            SpecError: the task has no such measure.
        """
        task, slash, name = metric.rpartition("/")
        if not slash:
            raise SpecError(f"the metric {metric!r} must be 'task/measure', such as 'text/loss'")
        if task not in self.tasks:
            there = nearest(task, self.tasks) if self.tasks else "the experiment has none"
            raise SpecError(f"the metric {metric!r} belongs to no held-out task: {there}")
        asked = self.tasks[task]
        found, written = asked.measures().get(name), answers and asked.generate
        if found is not None and (found.needs == "likelihood" or written):
            return found
        if written and not all(one.measures for one in asked.metrics):
            return Measure(name, better=None)
        if written:
            raise SpecError(f"the metric {metric!r} is not measured: {nearest(name, asked.measures())}")
        names = ", ".join(one.name for one in (*(one for head in asked.heads for one in head.measures), *MEASURES))
        raise SpecError(
            f"the metric {metric!r} must be one of {names} of {task}, unless "
            "train.evaluate is full and the task's generate is true"
        )

    def validate(self):
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        self.require(self.resamples >= 2000, "resamples", "at least 2000")
        self.require(self.seed >= 0, "seed", "at least 0")
