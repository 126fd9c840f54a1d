"""An experiment: everything that a run depends on, as one specification."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from polygpt.data.loader import DataSpec
from polygpt.data.tokenizers.base import TokenizerSpec
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import SpecError
from polygpt.evaluation import conditions
from polygpt.evaluation.spec import EvaluationSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.base import Objective
from polygpt.objectives.next_token import NextToken
from polygpt.optim.optim import Optim
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.processes import ProcessesSpec
from polygpt.runtime.watchdog import WatchdogSpec
from polygpt.sharding import MeshSpec
from polygpt.spec import Spec, hints
from polygpt.training.spikes import SpikeSpec


@dataclasses.dataclass(frozen=True)
class TrainSpec(Spec):
    """How long to train, on which devices, and what to do on the way."""

    steps: int
    """Batches to train on. A run that is started again with more steps goes on to them."""
    parallel: Literal["single", "pmap", "sharded", "auto"] = "auto"
    """auto: all devices, split in the way that suits the batch and the model; the choice is printed with its reason.
    single: one device. pmap: the batch split over all devices, parameters replicated. sharded: one program that the
    compiler splits over `mesh`."""
    mesh: MeshSpec = MeshSpec()
    """How devices are arranged and what is split over which, where `parallel` is sharded; others take none."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluate_every: int | None = None
    """Steps between evaluations, of which one is at the end; null for none."""
    evaluate: Literal["loss", "full"] = "loss"
    """What those evaluations measure: held-out losses alone, or written answers and the modality gain too (slow)."""
    metric: str = "loss"
    """What chooses the best checkpoint: "loss", the mean over the held-out tasks that measure the model as it is
    trained (over all, if none does), or a task's figure, "fusion/loss"."""
    better: Literal["lower", "higher"] = "lower"
    """Whether a lower or a higher metric is better."""
    use: Literal["best", "latest"] = "best"
    """Which checkpoint evaluation, generation and report use: the best by `metric`, or the latest (choose this where
    the held-out tasks are the test set: choosing by them would flatter)."""
    patience: int | None = None
    """Training stops after so many evaluations in a row without a better metric; null for never."""
    max_nonfinite: int = 10
    """Training stops with an error after so many steps in a row whose loss or gradient is not finite."""
    spikes: SpikeSpec | None = None
    """What counts as a spike of the loss, and what follows; null to take every finite step."""
    prefetch: int = 2
    """Batches that are made and sent to the device in advance."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are written and which are kept."""
    watchdog: WatchdogSpec | None = WatchdogSpec()
    """When a run counts as stuck, so that the stacks of all threads are written down; null for never."""
    processes: ProcessesSpec = ProcessesSpec()
    """How long several processes wait for each other."""

    def validate(self):
        self.require(self.steps >= 1, "steps", "at least 1")
        self.require(self.log_every >= 1, "log_every", "at least 1")
        self.require(self.evaluate_every is None or self.evaluate_every >= 1, "evaluate_every", "null or at least 1")
        self.require(self.patience is None or self.patience >= 1, "patience", "null or at least 1")
        self.require(
            self.patience is None or self.evaluate_every is not None, "patience", "null without evaluate_every"
        )
        self.require(self.max_nonfinite >= 1, "max_nonfinite", "at least 1")
        self.require(self.prefetch >= 1, "prefetch", "at least 1")
        self._validate_mesh()

    def _validate_mesh(self):
        """A mesh that nothing would read is a mistake, and is not passed over in silence."""
        default = MeshSpec()
        given = [name for name in hints(MeshSpec) if getattr(self.mesh, name) != getattr(default, name)]
        if not given or self.parallel == "sharded":
            return
        names = " and ".join(f"train.mesh.{name}" for name in given)
        words = [f"--train.mesh.{name} {getattr(default, name)}" for name in given if name != "rules"]
        back = f", or take it back with {' '.join(words)}".replace(" None", " null") if words else ""
        raise SpecError(
            f"train.parallel is {self.parallel!r}, which takes no mesh, and {names} "
            f"{'is' if len(given) == 1 else 'are'} set: write --train.parallel sharded{back}"
        )


@dataclasses.dataclass(frozen=True)
class Experiment(Spec):
    """A run, from data to evaluation. Two runs of equal experiments on equal devices are equal to the bit."""

    name: str
    """The run folder is runs/<name> unless another is given."""
    data: DataSpec
    """What the model is trained on."""
    optim: Optim
    """How it is trained."""
    train: TrainSpec
    """How long, where, and what happens on the way."""
    model: ModelSpec = ModelSpec()
    """The model."""
    tokenizer: TokenizerSpec = Bytes()
    """Text to token ids."""
    objectives: Mapping[str, tuple[Objective, float]] = dataclasses.field(
        default_factory=lambda: {"next_token": (NextToken(), 1.0)}
    )
    """By name, an objective and its share in the loss."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """The held-out tasks."""
    seed: int = 0
    """Of initial parameters, dropout, the order of examples and augmentation."""

    def validate(self):
        self.require(bool(self.name) and "/" not in self.name, "name", "a name without '/'")
        self.require(bool(self.objectives), "objectives", "at least one objective")
        self.require(self.seed >= 0, "seed", "at least 0")
        self._validate_metric()
        limit = self.model.decoder.position.limit()
        self.data.layout.require(
            limit is None or self.data.layout.seq_len <= limit,
            "seq_len",
            f"at most {limit}, the number of positions that model.decoder.position knows",
        )
        for name, task in self.evaluation.tasks.items():
            conditions.check(name, task, self.model, self.data.layout)
        self.train.require(
            self.train.evaluate_every is None or bool(self.evaluation.tasks),
            "evaluate_every",
            "null where the evaluation has no tasks",
        )

    def _validate_metric(self):
        task, slash, measure = self.train.metric.rpartition("/")
        if not slash:
            self.train.require(measure == "loss", "metric", "'loss' or '<task>/<measure>'")
            return
        try:
            found = self.evaluation.measure(self.train.metric, answers=self.train.evaluate == "full")
        except SpecError as error:
            raise SpecError(f"train.metric: {error}") from None
        if found.better not in (None, self.train.better):
            raise SpecError(
                f"train.better is {self.train.better!r}, and {found.better} values of {self.train.metric} are better: "
                f"write --train.better {found.better}"
            )
