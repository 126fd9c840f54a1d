"""polygpt evaluate RUN: the held-out results of a trained model."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from polygpt.cli.arguments import Parser, change
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt evaluate runs/quickstart
  polygpt evaluate runs/quickstart --checkpoint latest --json
  polygpt evaluate runs/quickstart --evaluation.tasks.fusion.limit 50 --evaluation.modality_gain false
  polygpt evaluate runs/quickstart --help

A task that cannot be measured takes no other's results away: its error is a line below them, and the exit code is 2."""
MAY_CHANGE = ("data", "evaluation")
"""Parts of a trained run's experiment that decide how it is evaluated."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, _fields)
    add_run(words)
    return words


def _fields(run: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """For the help: those parts of the experiment of a run that may change."""
    if run is None:
        return None
    from polygpt.data.loader import DataSpec
    from polygpt.evaluation.spec import EvaluationSpec
    from polygpt.spec import Spec
    from polygpt.training.workdir import load_experiment

    @dataclasses.dataclass(frozen=True)
    class Evaluated(Spec):
        data: DataSpec
        evaluation: EvaluationSpec

    chosen = changed(load_experiment(Path(run)), changes, options)
    return Evaluated(chosen.data, chosen.evaluation)


def changed(experiment, changes: Mapping[str, str], options: Sequence[str] = ()):
    """A trained run's experiment with overrides. Raises UserError for one that would not have trained this model."""
    for name in changes:
        part = name.partition(".")[0]
        if part not in MAY_CHANGE and hasattr(experiment, part):
            raise UserError(f"evaluate: --{name} is settled, the run is trained: change --data.* or --evaluation.*")
    return change(experiment, changes, options)


def add_run(words: Parser) -> None:
    """The arguments that name a trained model."""
    words.add_argument("run", metavar="RUN", help="a run folder, such as runs/quickstart")
    words.add_argument("--checkpoint", choices=("best", "latest"), help="which one (default: as the run's train.use)")
    spread = "over all devices, on the run's mesh (default: the first device alone)"
    words.add_argument("--spread", action="store_true", help=spread)
    add_code(words)


def add_code(words: Parser) -> None:
    """The argument that chooses which code the user's classes come from."""
    about = "your own classes: as the run has kept them, or as their files are now (default: run)"
    words.add_argument("--code", choices=("run", "current"), default="run", help=about)


def open_named(arguments: Namespace):
    """The run that the arguments of `add_run` name."""
    from polygpt.training.run import open_run

    return open_run(arguments.run, arguments.checkpoint, arguments.spread, arguments.code)


def run(arguments: Namespace) -> dict:
    """Evaluates and writes the results into the run folder; returns them."""
    from polygpt.cli.progress import Progress
    from polygpt.cli.results import failed, print_results
    from polygpt.report.finish import evaluate_run

    with Progress() as progress:
        trained = open_named(arguments)
        experiment = changed(trained.experiment, arguments.changes, arguments.options)
        trained = dataclasses.replace(trained, experiment=experiment)
        results = evaluate_run(trained, progress, overrides=arguments.changes)
    print_results(results, experiment.evaluation.measures())
    return results | failed(results)
