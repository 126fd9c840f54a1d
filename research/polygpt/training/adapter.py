"""Saves the adapter of a run in a file of its own."""

from pathlib import Path
from typing import Literal

from polygpt.models.adapter_file import AdapterFile, require_new
from polygpt.spec import to_json
from polygpt.training import resuming
from polygpt.training.run import open_as_trained
from polygpt.training.workdir import Code


def save_adapter(
    workdir: str | Path, file: str | Path, checkpoint: Literal["best", "latest"] | None = None, code: Code = "run"
) -> AdapterFile:
    """Writes what a run with `model.low_rank` or `model.prefix` trained, without its frozen base, and returns it.

    Args:
        workdir: the run folder.
        file: the file, conventionally `.npz`. `open_run(base, adapter=file)` reads it.
        checkpoint: see `open_run`.
        code: see `open_run`.

    Raises:
        UserError: if the file exists, or the run cannot be opened or has no frozen base.
    """
    require_new(Path(file))
    run = open_as_trained(workdir, checkpoint, code=code)
    given = to_json(run.experiment.model), to_json(run.experiment.tokenizer), run.experiment.data.layout
    given += f"{workdir}, step {run.step}", resuming.merged_from(Path(workdir))
    found = AdapterFile.of(run.model, run.params, *given, run.infilling and to_json(run.infilling))
    found.write(Path(file))
    return found
