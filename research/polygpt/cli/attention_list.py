"""polygpt attention list: every variant and the backends that compute it."""

import dataclasses
import textwrap
from argparse import Namespace

from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table

EXAMPLES = """\
examples:
  polygpt attention list
  polygpt attention list --markdown
  polygpt train experiments/quickstart.py --model.decoder.attention polygpt.attention.sliding:SlidingWindow

Your own variant can be in any file: polygpt attention new NAME."""

PACKAGE = "polygpt.attention."


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("--markdown", action="store_true", help="print only the variants, as a Markdown table")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the variants, then the backends; returns them as data."""
    from polygpt.attention.kernels import dispatch
    from polygpt.lab import catalogue

    entries = [catalogue.entry(cls) for cls in catalogue.variants()]
    backends = dispatch.describe()
    if arguments.markdown:
        print(catalogue.markdown(entries))
    else:
        rows = [
            [
                one.spec.removeprefix(PACKAGE),
                one.family,
                ", ".join(one.paper.split(", ")[:2]) or "–",  # without the place
                "all" if set(one.backends) == set(dispatch.BACKENDS) else ", ".join(one.backends) or "its own",
                one.cost,
            ]
            for one in entries
        ]
        columns = ["variant", "family", "paper", "backends", "FLOPs per query over S keys"]
        print_table(f"{len(rows)} variants; prefix names with {PACKAGE}", columns, rows)
        print("backends of the softmax family, --model.decoder.attention.backend NAME:")
        for name, text in backends.items():
            print(textwrap.fill(text, 120, initial_indent=f"  {name:11}", subsequent_indent=" " * 13))
    return {"variants": [dataclasses.asdict(one) for one in entries], "backends": backends}
