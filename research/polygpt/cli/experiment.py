"""From the FILE and the overrides of a command line to an experiment."""

from collections.abc import Mapping, Sequence

from polygpt.cli.arguments import change
from polygpt.errors import UserError
from polygpt.spec import faults_of, load_file


def fields(file: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """For a parser whose first word is a FILE: the experiment whose fields its help lists."""
    return load(file, changes, options) if file else None


def load(file: str, changes: Mapping[str, str], options: Sequence[str] = ()):
    """The experiment that a file's `experiment()` makes, with overrides.

    Raises:
        UserError: if the file fails or makes none, or an override names nothing; `options` are suggested beside its
            fields.
    """
    make = getattr(load_file(file), "experiment", None)
    if not callable(make):
        raise UserError(f"{file}: no function experiment(): write `def experiment() -> Experiment:` in it")

    from polygpt.training.experiment import Experiment  # not before: a wrong name or a syntax error is told at once

    with faults_of(file):
        made = make()
    if not isinstance(made, Experiment):
        raise UserError(f"{file}: experiment() returns {type(made).__name__}: it must return an Experiment")
    return change(made, changes, options)
