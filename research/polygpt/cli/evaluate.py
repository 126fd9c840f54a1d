"""polygpt evaluate RUN: evaluate a trained model on held-out data."""

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
  polygpt evaluate runs/quickstart --adapter french.npz
  polygpt evaluate runs/quickstart --help

If a task cannot be measured, its error is printed below the results of the others, and the exit code is 2."""
MAY_CHANGE = ("data", "evaluation")
"""Parts of the experiment that control evaluation."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, _fields)
    add_run(words)
    add_adapter(words)
    return words


def _fields(run: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """For --help: the parts of a run's experiment that may change."""
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
    """A trained run's experiment with overrides. Raises UserError for overrides that affect training."""
    for name in changes:
        part = name.partition(".")[0]
        if part not in MAY_CHANGE and hasattr(experiment, part):
            raise UserError(f"evaluate: --{name} cannot change after training: only --data.* and --evaluation.* can")
    return change(experiment, changes, options)


def add_run(words: Parser, about: str = "run folder, such as runs/quickstart") -> None:
    """Adds the arguments that select a trained model."""
    words.add_argument("run", metavar="RUN", help=about)
    add_checkpoint(words)
    spread = "use all devices, on the run's mesh (default: only the first device)"
    words.add_argument("--spread", action="store_true", help=spread)
    add_code(words)


def add_checkpoint(words: Parser) -> None:
    """Adds the argument that selects a checkpoint."""
    words.add_argument(
        "--checkpoint", choices=("best", "latest"), help="which checkpoint (default: the run's train.use)"
    )


def add_adapter(words: Parser) -> None:
    """Adds the argument that selects an adapter."""
    about = "use the run with this adapter, fine-tuned from it (polygpt adapter save)"
    words.add_argument("--adapter", metavar="FILE", help=about)


def add_code(words: Parser) -> None:
    """Adds the argument that selects the code of user classes."""
    about = "load your own classes from the run's copies, or from the current files (default: run)"
    words.add_argument("--code", choices=("run", "current"), default="run", help=about)


def open_named(arguments: Namespace):
    """Opens the run selected by the arguments of `add_run`, with that of `add_adapter` if the verb has it."""
    from polygpt.training.run import open_run

    adapter = getattr(arguments, "adapter", None)
    return open_run(arguments.run, arguments.checkpoint, arguments.spread, arguments.code, adapter)


def run(arguments: Namespace) -> dict:
    """Evaluates and writes the results into the run folder, unless with an adapter; returns them."""
    from polygpt.cli.progress import Progress
    from polygpt.cli.results import failed, print_results
    from polygpt.evaluation.likelihood import UNSCORED, predicts_text
    from polygpt.report.finish import evaluate_run

    with Progress() as progress:
        trained = open_named(arguments)
        experiment = changed(trained.experiment, arguments.changes, arguments.options)
        trained = dataclasses.replace(trained, experiment=experiment)
        results = evaluate_run(trained, progress, overrides=arguments.changes)
    print_results(results, experiment.evaluation.measures())
    if not predicts_text(trained.model.spec):
        print(UNSCORED)
    return results | failed(results)
