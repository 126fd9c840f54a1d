"""polygpt report RUN: one self-contained HTML file."""

from argparse import Namespace

from polygpt.cli.arguments import Parser
from polygpt.cli.evaluate import add_run, open_named

EXAMPLES = """\
examples:
  polygpt report runs/quickstart
  polygpt report runs/quickstart --output figures/quickstart.html

A run that is under way or was killed has a report too, of what is there."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    add_run(words)
    words.add_argument("--output", metavar="FILE", help="where to write it (default: RUN/report.html)")
    return words


def run(arguments: Namespace) -> dict:
    """Writes the report and returns its place."""
    from polygpt.report.finish import write_report

    opened = open_named(arguments)
    report = write_report(opened, arguments.output)
    print(f"report: {report}")
    return {"step": opened.step, "report": report}
