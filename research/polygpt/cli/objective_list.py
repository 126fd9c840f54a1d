"""polygpt objective list: every objective, what it reads and what it needs."""

import dataclasses
from argparse import Namespace

from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table

EXAMPLES = """\
examples:
  polygpt objective list
  polygpt objective list --markdown
  polygpt train experiments/quickstart.py --objectives '{"next": ["polygpt.objectives.focal:Focal", 1]}'

Your own objective can be in any file; test it with polygpt objective check FILE.py:CLASS."""

PACKAGE = "polygpt.objectives."


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the objectives; returns them as data."""
    from polygpt.lab.objective import catalogue

    entries = [catalogue.entry(cls) for cls in catalogue.objectives()]
    if arguments.markdown:
        print(catalogue.markdown(entries))
    else:
        rows = [
            [one.spec.removeprefix(PACKAGE), one.paper or "–", one.view or "–", one.needs or "–", one.about]
            for one in entries
        ]
        columns = ["objective", "paper", "view", "needs", "what it is"]
        print_table(f"{len(rows)} objectives; prefix names with {PACKAGE}", columns, rows, prose=(3, 4))
    return {"objectives": [dataclasses.asdict(one) for one in entries]}
