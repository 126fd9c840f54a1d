"""polygpt report RUN: write a self-contained HTML report."""

from argparse import Namespace

from polygpt.cli.arguments import Parser
from polygpt.cli.evaluate import add_run, open_named

EXAMPLES = """\
examples:
  polygpt report runs/quickstart
  polygpt report runs/quickstart --output figures/quickstart.html

Works for unfinished and killed runs too, with whatever they have written."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    add_run(words)
    words.add_argument("--output", metavar="FILE", help="output file (default: RUN/report.html)")
    return words


def run(arguments: Namespace) -> dict:
    """Writes the report and returns its path."""
    from polygpt.report.finish import write_report

    opened = open_named(arguments)
    report = write_report(opened, arguments.output)
    print(f"report: {report}")
    return {"step": opened.step, "report": report}
