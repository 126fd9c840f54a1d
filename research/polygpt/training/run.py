"""A trained model from its run folder."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax

from polygpt.data.tokenizers.base import Tokenizer
from polygpt.errors import UserError
from polygpt.models.functional import Model, bind
from polygpt.training.checkpoint import best, first_line, read_parameters, records
from polygpt.training.experiment import Experiment
from polygpt.training.workdir import load_experiment


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        experiment: what it was trained by.
        model: its functional form.
        tokenizer: its tokenizer.
        params: its parameters on the first device; the moving average where the experiment keeps one.
        step: the checkpoint's step.
        workdir: the run folder.
    """

    experiment: Experiment
    model: Model
    tokenizer: Tokenizer
    params: Any
    step: int
    workdir: Path


def open_run(workdir: str | Path, checkpoint: Literal["best", "latest"] | None = None) -> Run:
    """Opens a run folder.

    Args:
        workdir: the folder.
        checkpoint: the one with the best metric, or the latest; without evaluations on the way, both are the latest.
            By default what the experiment's train.use says.

    Raises:
        UserError: if it is no run folder, has no whole checkpoint, or the checkpoint cannot be read.
    """
    workdir = Path(workdir)
    experiment = load_experiment(workdir)
    folder = (workdir / "checkpoints").absolute()
    found = [record for record in records(folder) if record.finite]
    if not found:
        raise UserError(f"{workdir} holds no whole checkpoint: train it further with polygpt train")
    use = checkpoint or experiment.train.use
    chosen = (best(found, experiment.train.better) if use == "best" else None) or found[-1]
    tokenizer = experiment.tokenizer.build()
    model = bind(experiment.model, tokenizer.vocabulary)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.abstract())
    try:
        params = read_parameters(folder, chosen.step, target, averaged=experiment.optim.ema is not None)
    except Exception as error:  # whatever Orbax raises for a damaged file
        raise UserError(f"{folder / str(chosen.step)} cannot be read: {first_line(error)}") from error
    return Run(experiment, model, tokenizer, params, chosen.step, workdir)
