"""Loads an experiment from a FILE and the overrides on the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from polygpt.cli.arguments import Parser, change
from polygpt.errors import UserError
from polygpt.spec import faults_of, load_file

EITHER = "a Python file with `def experiment() -> Experiment`, or a run folder"
"""What a verb reads that needs an experiment, trained or not."""


def fields(file: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """For a parser whose first argument is a FILE: the experiment whose fields `--help` lists."""
    return load(file, changes, options, runs=True) if file else None


def load(file: str, changes: Mapping[str, str], options: Sequence[str] = (), runs: bool = False):
    """The experiment that a file's `experiment()` returns, with overrides.

    Args:
        file: the file; with `runs` also a run folder, for the experiment that it was trained with.
        changes: the overrides.
        options: names of options.
        runs: whether a run folder will do.

    Raises:
        UserError: if the file fails or returns something else, or an override matches no field; suggests fields and
            `options`.
    """
    if runs and Path(file).is_dir():
        from polygpt.training.workdir import load_experiment

        return change(load_experiment(Path(file)), changes, options)
    make = getattr(load_file(file), "experiment", None)
    if not callable(make):
        raise UserError(f"{file}: no function experiment(): write `def experiment() -> Experiment:` in it")

    from polygpt.training.experiment import Experiment  # late, so that syntax errors are reported at once

    with faults_of(file):
        made = make()
    if not isinstance(made, Experiment):
        raise UserError(f"{file}: experiment() returned {type(made).__name__}: it must return an Experiment")
    return change(made, changes, options)


def add_phase(words: Parser) -> None:
    """Adds the option `--phase`."""
    about = "which phase of a run with train.phases (default: 0)"
    words.add_argument("--phase", type=int, default=0, metavar="N", help=about)


def of_phase(chosen, phase: int, verb: str) -> tuple:
    """(the experiment of a phase, which one it is in a line; "" for a run without phases).

    Raises:
        UserError: if there is no such phase.
    """
    from polygpt.training.phase import expanded, name_of

    parts = expanded(chosen)
    if not 0 <= phase < len(parts):
        raise UserError(f"{verb}: --phase is {phase}: this run has the phases 0 to {len(parts) - 1}")
    if len(parts) == 1:
        return parts[0], ""
    where = name_of(phase - 1, chosen.train.phases[phase - 1]) if phase else "the beginning of the run"
    return parts[phase], f"phase {phase} of 0 to {len(parts) - 1}: {where}; --phase chooses another"
