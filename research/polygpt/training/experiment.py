"""An experiment: everything a run depends on, in one specification."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from polygpt.data.loader import DataSpec
from polygpt.data.tokenizers.base import TokenizerSpec
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.data.transforms.base import Transform
from polygpt.errors import SpecError
from polygpt.evaluation import conditions
from polygpt.evaluation.spec import EvaluationSpec
from polygpt.init.base import Init, Random
from polygpt.init.reference import Reference
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.base import Objective
from polygpt.objectives.forward import AVERAGE, missing
from polygpt.objectives.next_token import NextToken
from polygpt.optim.optim import Optim
from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.runtime.processes import ProcessesSpec
from polygpt.runtime.watchdog import WatchdogSpec
from polygpt.sharding import MeshSpec
from polygpt.spec import Spec, hints, specs_in
from polygpt.training.phase import Phase, expanded
from polygpt.training.plateau import Plateau
from polygpt.training.spikes import SpikeSpec


@dataclasses.dataclass(frozen=True)
class TrainSpec(Spec):
    """How long to train, on which devices, and when to log, evaluate and save."""

    steps: int
    """Number of training steps. A run restarted with more steps continues up to them."""
    parallel: Literal["single", "pmap", "sharded", "auto"] = "auto"
    """auto: use all devices, split to suit the batch and the model; prints the choice and the reason. single: one
    device. pmap: split the batch over all devices, replicate parameters. sharded: one program that the compiler
    partitions over `mesh`."""
    mesh: MeshSpec = MeshSpec()
    """How devices are arranged and what is split over which axis. Only for `parallel` sharded."""
    log_every: int = 10
    """Steps between logged metrics."""
    evaluate_every: int | None = None
    """Steps between evaluations; the last step is evaluated too. null: no evaluation during training."""
    evaluate: Literal["loss", "full"] = "loss"
    """What evaluations during training measure. loss: held-out losses only. full: generated answers and the modality
    gain as well (slow)."""
    metric: str = "loss"
    """Metric that selects the best checkpoint: a task's metric, as in "fusion/loss", or "loss", the mean over the
    held-out tasks that evaluate the model under training conditions (over all tasks if there are none)."""
    better: Literal["lower", "higher"] = "lower"
    """Whether lower or higher values of `metric` are better."""
    use: Literal["best", "latest"] = "best"
    """Checkpoint that evaluation, generation and reports use: the best by `metric`, or the latest. Use latest when the
    held-out tasks are the test set, because selecting by them would bias the results."""
    patience: int | None = None
    """Stop after this many consecutive evaluations without improvement; null: never."""
    plateau: Plateau | None = None
    """Lowers the learning rate when `metric` stops improving; null: never."""
    max_nonfinite: int = 10
    """Fail after this many consecutive steps with a non-finite loss or gradient."""
    spikes: SpikeSpec | None = None
    """When a step counts as a loss spike and how to respond; null: apply every finite step."""
    prefetch: int = 2
    """Batches prepared and sent to the device ahead of time."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are written, and which are kept."""
    watchdog: WatchdogSpec | None = WatchdogSpec()
    """When a run counts as stuck; the stacks of all threads are then dumped. null: never."""
    processes: ProcessesSpec = ProcessesSpec()
    """How long processes wait for each other."""
    phases: tuple[Phase, ...] = ()
    """Fields of the experiment that differ from some step on, such as longer rows or layers that are no longer frozen:
    see training/phase.py."""

    def validate(self):
        self.require(self.steps >= 1, "steps", "at least 1")
        starts = [phase.start for phase in self.phases]
        self.require(starts == sorted(set(starts)), "phases", "in the order of their starts, which must differ")
        self.require(self.log_every >= 1, "log_every", "at least 1")
        self.require(self.evaluate_every is None or self.evaluate_every >= 1, "evaluate_every", "null or at least 1")
        self.require(self.patience is None or self.patience >= 1, "patience", "null or at least 1")
        self.require(
            self.patience is None or self.evaluate_every is not None, "patience", "null without evaluate_every"
        )
        self.require(self.plateau is None or self.evaluate_every is not None, "plateau", "null without evaluate_every")
        self.require(self.max_nonfinite >= 1, "max_nonfinite", "at least 1")
        self.require(self.prefetch >= 1, "prefetch", "at least 1")
        self._validate_mesh()

    def _validate_mesh(self):
        """Rejects mesh settings that the chosen mode would ignore."""
        default = MeshSpec()
        given = [name for name in hints(MeshSpec) if getattr(self.mesh, name) != getattr(default, name)]
        if not given or self.parallel == "sharded":
            return
        names = " and ".join(f"train.mesh.{name}" for name in given)
        words = [f"--train.mesh.{name} {getattr(default, name)}" for name in given if name != "rules"]
        back = f", or reset it with {' '.join(words)}".replace(" None", " null") if words else ""
        raise SpecError(
            f"train.parallel is {self.parallel!r}, which ignores the mesh, but {names} "
            f"{'is' if len(given) == 1 else 'are'} set: write --train.parallel sharded{back}"
        )


@dataclasses.dataclass(frozen=True)
class Experiment(Spec):
    """A run, from data to evaluation. Equal experiments on equal devices give bit-identical runs."""

    name: str
    """Name of the run; the default run folder is runs/<name>."""
    data: DataSpec
    """Training data."""
    optim: Optim
    """Optimizer and learning-rate schedule."""
    train: TrainSpec
    """Length of training, devices, logging, evaluation and checkpoints."""
    model: ModelSpec = ModelSpec()
    """The model."""
    tokenizer: TokenizerSpec = Bytes()
    """Maps text to token ids."""
    objectives: Mapping[str, tuple[Objective, float]] = dataclasses.field(
        default_factory=lambda: {"next_token": (NextToken(), 1.0)}
    )
    """Objectives by name, each with its weight in the loss."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """The held-out tasks."""
    seed: int = 0
    """Seeds initial parameters, dropout, example order and augmentation."""
    init: Init = Random()
    """Where the initial parameters come from: random values, or another run (polygpt.init.from_run:FromRun)."""
    references: Mapping[str, Reference] = dataclasses.field(default_factory=dict)
    """Models by name that objectives read and that are not trained, such as a teacher."""

    def validate(self):
        self.require(bool(self.name) and "/" not in self.name, "name", "a name without '/'")
        self.require(bool(self.objectives), "objectives", "at least one objective")
        self.require(self.seed >= 0, "seed", "at least 0")
        self._validate_metric()
        self._validate_references()
        self._validate_special_tokens()
        for name, (objective, _) in self.objectives.items():
            try:
                objective.check_with(self.model, self.data.layout)
            except SpecError as error:
                raise SpecError(f"objectives.{name}: {error}") from None
        self.model.check_with(self.data.layout)
        for name, task in self.evaluation.tasks.items():
            conditions.check(name, task, self.model, self.data.layout)
        self.train.require(
            self.train.evaluate_every is None or bool(self.evaluation.tasks),
            "evaluate_every",
            "null when there are no evaluation tasks",
        )
        if self.train.phases:
            expanded(self)

    def _validate_references(self):
        """Requires the models and scores that objectives read."""
        there = {*self.references, *([AVERAGE] if self.optim.ema is not None else [])}
        for name, (objective, _) in self.objectives.items():
            if unknown := next((other for other in objective.others if other not in there), None):
                raise SpecError(f"objectives.{name} reads the model {unknown!r}: {missing(unknown, there)}")
            if lacking := next((one for one in objective.cached if one not in self.data.scores), None):
                known = f"which has {', '.join(self.data.scores)}" if self.data.scores else "which is empty"
                raise SpecError(
                    f"objectives.{name} reads the scores {lacking!r}: add their folder, which polygpt data score "
                    f"writes, to data.scores, {known}"
                )

    def _validate_special_tokens(self):
        there = self.tokenizer.special
        for transform in specs_in((self.data, self.evaluation)):
            names = transform.special if isinstance(transform, Transform) else ()
            if lacking := [name for name in names if name not in there]:
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                name = type(transform).__name__
                raise SpecError(
                    f"{name} needs the special tokens {lacking[0]!r}{more}, which the tokenizer lacks: set tokenizer "
                    f"to SpecialTokens(..., {name}(...).special)"
                )

    def _validate_metric(self):
        task, slash, measure = self.train.metric.rpartition("/")
        shown = self.model.decoder.mask == "bidirectional" and self.train.evaluate_every is not None
        if shown and measure in ("loss", "perplexity", "bits_per_byte", "token_accuracy"):
            raise SpecError(
                f"train.metric is {self.train.metric!r}, which scores next tokens, and model.decoder.mask "
                "'bidirectional' shows them: choose the measure of a head, or MaskedLM with the mask 'spans'"
            )
        if not slash:
            self.train.require(measure == "loss", "metric", "'loss' or '<task>/<measure>'")
            return
        try:
            found = self.evaluation.measure(self.train.metric, answers=self.train.evaluate == "full")
        except SpecError as error:
            raise SpecError(f"train.metric: {error}") from None
        if found.better not in (None, self.train.better):
            raise SpecError(
                f"train.better is {self.train.better!r}, but {found.better} values of {self.train.metric} are better: "
                f"write --train.better {found.better}"
            )
