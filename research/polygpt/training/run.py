"""Opens a trained model from its run folder."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from polygpt import sharding
from polygpt.data.layout import LayoutSpec
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.data.transforms.fill_in_the_middle import FillInTheMiddle
from polygpt.errors import SpecError, UserError
from polygpt.evaluation.head_metric import OutputMetric
from polygpt.generation.generate import Generated, Prompt, generate
from polygpt.generation.sampling import Sampling
from polygpt.models.adapter_file import AdapterFile, merged_from
from polygpt.models.functional import Model, bind
from polygpt.models.multimodal import ModelSpec
from polygpt.objectives.base import Objective
from polygpt.runtime import manifest
from polygpt.runtime.checkpoint import choose, first_line, listed
from polygpt.runtime.manifest import Record
from polygpt.runtime.processes import broadcast, first_fault
from polygpt.runtime.stored import read_parameters
from polygpt.spec import from_json, specs_in, to_json
from polygpt.training.experiment import Experiment
from polygpt.training.phase import at
from polygpt.training.program import assemble
from polygpt.training.workdir import Code, load_experiment, loader

log = logging.getLogger(__name__)

UNTRAINED = {"objectives": {"none": (Objective(), 1.0)}, "references": {}}
"""Fields of an experiment that only runs its model: what its objectives read, such as a teacher or a head, may be gone.
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        experiment: the experiment that trained it; that of the checkpoint's phase, if it has several.
        model: the functional model.
        tokenizer: the tokenizer.
        params: parameters, on the first device or sharded over all; the moving average if the experiment keeps one.
        step: the checkpoint's step.
        workdir: the run folder.
        adapter: the file of the adapter that it uses, or None.
        own_infill: how its adapter has learned to fill in the middle; None leaves it to the experiment.
        merged_from: what merged matrices were merged from, see `adapter_file.merged_from`.
    """

    experiment: Experiment
    model: Model
    tokenizer: Tokenizer
    params: Any
    step: int
    workdir: Path
    adapter: Path | None = None
    own_infill: FillInTheMiddle | None = None
    merged_from: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def merged(self) -> "Run":
        """The run with low-rank updates merged into their matrices, see `Model.merged`."""
        if self.model.merged is self.model:
            return self
        made = merged_from(self.params, self.model.spec.low_rank, self.merged_from)
        params = jax.jit(self.model.merge)(self.params)
        return dataclasses.replace(self, model=self.model.merged, params=params, merged_from=made)

    def with_adapter(self, file: str | Path, code: Code = "run") -> "Run":
        """The run with an adapter that was trained on it, merged, which reads examples as it was trained to. Other
        adapters of the same base may follow.

        Args:
            file: from `save_adapter`.
            code: see `open_run`.

        Raises:
            UserError: the file is damaged, or its adapter was trained on another base.
        """
        found = AdapterFile.read(Path(file))
        if found.tokenizer != to_json(self.experiment.tokenizer):
            raise UserError(f"{file}: trained with another tokenizer than {self.workdir}: name its own base")
        load = loader(self.workdir, code)
        spec = from_json(found.model, f"{file}: model", load)
        infill = self.own_infill if found.infill is None else from_json(found.infill, f"{file}: infill", load)
        model = bind(spec, self.tokenizer.vocabulary).on(self.model.layout)
        try:
            params = found.onto(model, self.params, _places(model), self.merged_from)
        except UserError as error:
            raise UserError(
                f"{file}, from {found.origin}, does not fit {self.workdir}, step {self.step}: {error}: name the run "
                "and the checkpoint that it started from"
            ) from None
        given = {"experiment": _with_model(self.experiment, spec, found.layout), "own_infill": infill}
        return dataclasses.replace(self, model=model, params=params, adapter=Path(file), **given).merged()

    @property
    def infilling(self) -> FillInTheMiddle | None:
        """How the model has learned to fill in the middle, or None."""
        trained = (one for one in specs_in(self.experiment.data) if isinstance(one, FillInTheMiddle) and one.rate > 0)
        return self.own_infill or next(trained, None)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Generated]:
        """The continuation of each prompt; by default with the sampling of the experiment's evaluation.

        Raises:
            BadRecord: if a prompt cannot be laid out.
        """
        layout, chosen = self.experiment.data.layout, sampling or self.experiment.evaluation.sampling
        return generate(self.model, self.params, self.tokenizer, prompts, layout, chosen)

    def infill(self, gaps: Sequence[tuple[Prompt, Prompt]], sampling: Sampling | None = None) -> list[Generated]:
        """What lies in each gap, which is given as what comes before it and what comes after it.

        Raises:
            UserError: if the model was not trained to fill in the middle.
            BadRecord: if a gap cannot be laid out.
        """
        return self.generate([self.infill_prompt(before, after) for before, after in gaps], sampling)

    def infill_prompt(self, before: Prompt, after: Prompt) -> Prompt:
        """The prompt whose continuation lies between two others. Raises UserError as `infill` does."""
        if self.infilling is None:
            raise UserError(
                f"{self.workdir}: the model was not trained to fill in the middle: train it with FillInTheMiddle in "
                "the transform of a task, or give no suffix"
            )
        return self.infilling.prompt(before, after)


def open_run(
    workdir: str | Path,
    checkpoint: Literal["best", "latest"] | None = None,
    spread: bool = False,
    code: Code = "run",
    adapter: str | Path | None = None,
) -> Run:
    """Opens a run folder. Low-rank updates are merged into their matrices.

    Args:
        workdir: the folder.
        checkpoint: "best" by metric, or "latest"; without evaluations during training both are the latest. Default: the
            experiment's train.use. If that checkpoint is damaged, the newest intact one is used, with a warning.
        spread: shard the model over all devices, as in training, if train.parallel is sharded or auto. Collective: all
            processes must open the run and make the same calls.
        code: "run" loads user classes from the run's own copies of their files, "current" from the files as they are
            now.
        adapter: a file from `save_adapter`, of an adapter that was trained on this run.

    Raises:
        UserError: not a run folder, no complete checkpoint, or no readable one (names them all); or an adapter that
            does not fit.
    """
    run = open_as_trained(workdir, checkpoint, spread, code).merged()
    return run if adapter is None else run.with_adapter(adapter, code)


def open_as_trained(
    workdir: str | Path,
    checkpoint: Literal["best", "latest"] | None = None,
    spread: bool = False,
    code: Code = "run",
) -> Run:
    """Opens a run folder, with the parameters as they were trained: low-rank updates apart. See `open_run`."""
    workdir = Path(workdir)
    experiment = load_experiment(workdir, code)
    folder = (workdir / "checkpoints").absolute()
    found = _finite(folder)
    if spread:  # all processes choose from what process 0 found
        seen = broadcast("checkpoints to open", json.dumps([dataclasses.astuple(record) for record in found]))
        found = [Record(*record) for record in json.loads(seen)]
    if not found:
        raise UserError(f"{workdir} has no complete checkpoint: resume it with polygpt train")
    use = checkpoint or experiment.train.use
    chosen = choose(found, use, experiment.train.better)
    tokenizer = experiment.tokenizer.build()
    model = bind(experiment.model, tokenizer.vocabulary)
    layout = None
    if spread and experiment.train.parallel in ("sharded", "auto"):
        layout = assemble(experiment.replace(**UNTRAINED), tokenizer.vocabulary).parallel.layout
    model = model.on(layout)
    target = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.abstract(), _places(model)
    )
    averaged, faults = experiment.optim.ema is not None, {}
    for record in [chosen, *(record for record in reversed(found) if record != chosen)]:
        place = folder / str(record.step)
        params, said = _read(place, target, averaged, spread)
        if not said:
            if experiment.train.phases:
                experiment = at(experiment, record.step)
                model = bind(experiment.model, tokenizer.vocabulary).on(layout)
            return Run(experiment, model, tokenizer, params, record.step, workdir)
        log.warning("skipping checkpoint %s: %s", place, said)
        faults[record.step] = said
    raise UserError(f"no checkpoint in {folder} can be read ({listed(faults)}): train the run again, or open another")


def _with_model(experiment: Experiment, model: ModelSpec, layout: Mapping[str, str]) -> Experiment:
    """The experiment of a base with the model of an adapter and other fields of the layout. Nothing is trained, and
    heads that the model lacks are not measured."""
    data, held_out, train = experiment.data, experiment.evaluation, experiment.train
    tasks = {name: task.replace(prompt_weight=0.0) for name, task in data.tasks.items()}
    data = data.replace(layout=data.layout.replace(**layout), tasks=tasks)
    measured = {
        name: task.replace(heads=tuple(one for one in task.heads if _reads(one, model, data.layout)))
        for name, task in held_out.tasks.items()
    }
    train = train.replace(metric="loss", evaluate_every=None, patience=None, plateau=None)
    changes = {"model": model, "data": data, "evaluation": held_out.replace(tasks=measured), "train": train}
    return experiment.replace(**changes, **UNTRAINED)


def _reads(metric: OutputMetric, model: ModelSpec, layout: LayoutSpec) -> bool:
    try:
        metric.check_with(model, layout)
    except SpecError:
        return False
    return True


def _places(model: Model) -> Any:
    """The shardings of a model's parameters: by its layout, or on the first device."""
    shapes = model.abstract()
    if model.layout is not None:
        return sharding.tree_shardings(model.layout, shapes, model.axes())
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: place, shapes)


def _finite(folder: Path) -> list[Record]:
    """The complete checkpoints, oldest first; logs a warning for each incomplete one."""
    found = []
    for step, record in manifest.survey(folder):
        if isinstance(record, manifest.Damaged):
            log.warning("skipping checkpoint %s/%d: %s", folder, step, record)
        elif record.finite:
            found.append(record)
    return found


def _read(place: Path, target: Any, averaged: bool, spread: bool) -> tuple[Any, str]:
    """Parameters and what is wrong with them ("" if nothing). All processes agree on this if `spread`."""
    items = ("ema" if averaged else "params",)
    if spread and (fault := manifest.verified_by_all(place, items)):
        return None, fault
    params, fault = None, ""
    try:
        if not spread:
            manifest.verify(place, items)
        params = read_parameters(place.parent, int(place.name), target, averaged)
    except Exception as error:  # Orbax raises various errors for damaged files
        fault = str(error) if isinstance(error, manifest.Damaged) else first_line(error)
    return params, first_fault(f"opened {place.name}", fault) if spread else fault
