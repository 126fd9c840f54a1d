"""polygpt evaluate RUN: the held-out results of a trained model."""

from argparse import Namespace

from polygpt.cli.arguments import Parser

EXAMPLES = """\
examples:
  polygpt evaluate runs/quickstart
  polygpt evaluate runs/quickstart --checkpoint latest --json"""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    add_run(words)
    return words


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
    from polygpt.cli.results import print_results
    from polygpt.report.finish import evaluate_run

    with Progress() as progress:
        trained = open_named(arguments)
        results = evaluate_run(trained, progress)
    print_results(results, trained.experiment.evaluation.measures())
    return results
