"""Loads an experiment from a FILE and the overrides on the command line."""

from collections.abc import Mapping, Sequence

from polygpt.cli.arguments import change
from polygpt.errors import UserError
from polygpt.spec import faults_of, load_file


def fields(file: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """For a parser whose first argument is a FILE: the experiment whose fields `--help` lists."""
    return load(file, changes, options) if file else None


def load(file: str, changes: Mapping[str, str], options: Sequence[str] = ()):
    """The experiment that a file's `experiment()` returns, with overrides.

    Raises:
        UserError: if the file fails or returns something else, or an override matches no field; suggests fields and
            `options`.
    """
    make = getattr(load_file(file), "experiment", None)
    if not callable(make):
        raise UserError(f"{file}: no function experiment(): write `def experiment() -> Experiment:` in it")

    from polygpt.training.experiment import Experiment  # late, so that syntax errors are reported at once

    with faults_of(file):
        made = make()
    if not isinstance(made, Experiment):
        raise UserError(f"{file}: experiment() returned {type(made).__name__}: it must return an Experiment")
    return change(made, changes, options)
