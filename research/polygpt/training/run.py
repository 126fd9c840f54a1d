"""A trained model from its run folder."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from polygpt import sharding
from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import UserError
from polygpt.generation.generate import Generated, Prompt, generate
from polygpt.generation.sampling import Sampling
from polygpt.models.functional import Model, bind
from polygpt.runtime import manifest
from polygpt.runtime.checkpoint import best, first_line, listed
from polygpt.runtime.manifest import Record
from polygpt.runtime.processes import agree, first_fault
from polygpt.runtime.stored import read_parameters
from polygpt.training.experiment import Experiment
from polygpt.training.program import assemble
from polygpt.training.workdir import Code, load_experiment

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        experiment: what it was trained by.
        model: its functional form.
        tokenizer: its tokenizer.
        params: its parameters, on the first device or over all; the moving average where the experiment keeps one.
        step: the checkpoint's step.
        workdir: the run folder.
    """

    experiment: Experiment
    model: Model
    tokenizer: Tokenizer
    params: Any
    step: int
    workdir: Path

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Generated]:
        """The continuation of each prompt; by default with the sampling of the experiment's evaluation.

        Raises:
            BadRecord: if a prompt cannot be laid out.
        """
        layout, chosen = self.experiment.data.layout, sampling or self.experiment.evaluation.sampling
        return generate(self.model, self.params, self.tokenizer, prompts, layout, chosen)


def open_run(
    workdir: str | Path,
    checkpoint: Literal["best", "latest"] | None = None,
    spread: bool = False,
    code: Code = "run",
) -> Run:
    """Opens a run folder.

    Args:
        workdir: the folder.
        checkpoint: the one with the best metric, or the latest; without evaluations on the way, both are the latest.
            By default what the experiment's train.use says. If it is damaged, the newest that is not takes its place,
            and the log says so.
        spread: over all devices, as it was trained, where its train.parallel is sharded or auto. Of several processes
            all have to open it, and to do the same with it.
        code: whether the user's classes are those that it was trained by, or those of their files as they are now.

    Raises:
        UserError: if it is no run folder, has no complete checkpoint, or none that can be read; it names them all.
    """
    workdir = Path(workdir)
    experiment = load_experiment(workdir, code)
    folder = (workdir / "checkpoints").absolute()
    found = _finite(folder)
    if spread:  # all choose from what the first has found
        seen = agree("checkpoints to open", json.dumps([dataclasses.astuple(record) for record in found]))
        found = [Record(*record) for record in json.loads(seen)]
    if not found:
        raise UserError(f"{workdir} has no complete checkpoint: continue it with polygpt train")
    use = checkpoint or experiment.train.use
    chosen = (best(found, experiment.train.better) if use == "best" else None) or found[-1]
    tokenizer = experiment.tokenizer.build()
    model = bind(experiment.model, tokenizer.vocabulary)
    target, layout = model.abstract(), None
    if spread and experiment.train.parallel in ("sharded", "auto"):
        layout = assemble(experiment, tokenizer.vocabulary).parallel.layout
    if layout is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda x: place, target)
    else:
        model, places = model.on(layout), sharding.tree(layout, target, model.axes())
    target = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), target, places)
    averaged, faults = experiment.optim.ema is not None, {}
    for record in [chosen, *(record for record in reversed(found) if record != chosen)]:
        place = folder / str(record.step)
        params, said = _read(place, target, averaged, spread)
        if not said:
            return Run(experiment, model, tokenizer, params, record.step, workdir)
        log.warning("checkpoint %s is passed over: %s", place, said)
        faults[record.step] = said
    raise UserError(f"no checkpoint in {folder} can be read ({listed(faults)}): train the run anew, or open another")


def _finite(folder: Path) -> list[Record]:
    """The whole checkpoints that can be used, oldest first; what is not whole is named in the log."""
    found = []
    for step, record in manifest.survey(folder):
        if isinstance(record, manifest.Damaged):
            log.warning("checkpoint %s/%d is passed over: %s", folder, step, record)
        elif record.finite:
            found.append(record)
    return found


def _read(place: Path, target: Any, averaged: bool, spread: bool) -> tuple[Any, str]:
    """Parameters, and what is wrong with them: "" if nothing. Where they are spread, all processes find the same."""
    items = ("ema" if averaged else "params",)
    if spread and (fault := manifest.verified_by_all(place, items)):
        return None, fault
    params, fault = None, ""
    try:
        if not spread:
            manifest.verify(place, items)
        params = read_parameters(place.parent, int(place.name), target, averaged)
    except Exception as error:  # whatever Orbax raises for a file that does not fit
        fault = str(error) if isinstance(error, manifest.Damaged) else first_line(error)
    return params, first_fault(f"opened {place.name}", fault) if spread else fault
