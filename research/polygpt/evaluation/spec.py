"""What is evaluated, and how."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from polygpt.data.sources.base import Source
from polygpt.errors import SpecError
from polygpt.evaluation.classification import Classification
from polygpt.evaluation.likelihood import MEASURES
from polygpt.evaluation.metric import Measure, Metric
from polygpt.generation.sampling import GREEDY, Sampling
from polygpt.spec import Spec, nearest


@dataclasses.dataclass(frozen=True)
class EvalTask(Spec):
    """A held-out task."""

    source: Source
    """Where its examples come from."""
    limit: int | None = None
    """How many examples are used, drawn once by the evaluation's seed; null for all."""
    generate: bool = False
    """Whether the model also writes each example's answer, which is compared with the truth by `metrics`."""
    metrics: tuple[Metric, ...] = (Classification(),)
    """What is measured of the written answers."""
    seq_len: int | None = None
    """T of its rows; null for that of training, `data.layout.seq_len`."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What is changed of the trained model, by the dotted names of the model's fields: {"decoder.attention": ...}. The
    parameters stay what they are, so their names and shapes must be those of the changed model too."""
    last: int | None = None
    """How many tokens of each example count, the last that are predicted; null for all. Answers are not concerned."""

    @property
    def as_trained(self) -> bool:
        """Whether it measures the model as it was trained: rows of that length, no changes, all tokens."""
        return self.seq_len is None and not self.model and self.last is None

    def measures(self) -> dict[str, Measure]:
        """What can be measured of it, by name and in the order of tables: its metrics' figures, then likelihoods."""
        return {one.name: one for one in (*(one for metric in self.metrics for one in metric.measures), *MEASURES)}

    def validate(self):
        self.require(self.limit is None or self.limit >= 1, "limit", "at least 1, or null for all examples")
        self.require(self.seq_len is None or self.seq_len >= 2, "seq_len", "at least 2, or null for that of training")
        self.require(self.last is None or self.last >= 1, "last", "at least 1, or null for all tokens")
        self.require(
            bool(self.metrics) or not self.generate, "metrics", "at least one metric where answers are generated"
        )


@dataclasses.dataclass(frozen=True)
class EvaluationSpec(Spec):
    """The held-out tasks and what is measured of each."""

    tasks: Mapping[str, EvalTask] = dataclasses.field(default_factory=dict)
    """The tasks by name."""
    batch_size: int = 32
    """How many examples are read at a time."""
    modality_gain: bool = True
    """Whether the modality gain of every task with media is measured: one more pass for each of its modalities."""
    resamples: int = 2000
    """Bootstrap resamples of the modality gain's interval."""
    sampling: Sampling = GREEDY
    """How answers are generated."""
    seed: int = 0
    """Decides which examples a limit leaves, how media are shuffled, and the bootstrap."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """What happens to an example that cannot be read: an error, or it is left out and counted as `skipped`."""

    def measures(self) -> dict[str, Measure]:
        """The measures of all tasks by name, in the order of tables. Likelihoods come last."""
        found = {name: one for task in self.tasks.values() for name, one in task.measures().items()}
        likelihoods = {one.name: one for one in MEASURES}
        return {name: one for name, one in found.items() if name not in likelihoods} | likelihoods

    def measure(self, metric: str, answers: bool = True) -> Measure:
        """What "task/measure" names. A figure that the task's metrics do not declare has no direction.

        Args:
            metric: "text/loss".
            answers: whether the model writes answers where a task asks for them.

        Raises:
            SpecError: no evaluation of the task gives such a figure.
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
        raise SpecError(
            f"the metric {metric!r} must be one of {', '.join(one.name for one in MEASURES)} of {task}, unless "
            "train.evaluate is full and the task's generate is true"
        )

    def validate(self):
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        self.require(self.resamples >= 2000, "resamples", "at least 2000")
        self.require(self.seed >= 0, "seed", "at least 0")
