"""polygpt adapter list FILES: what adapters are, and whether they fit a run."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser
from polygpt.cli.evaluate import add_checkpoint, add_code

EXAMPLES = """\
examples:
  polygpt adapter list adapters/*.npz --base runs/quickstart"""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("files", metavar="FILE", nargs="+", help="files that polygpt adapter save wrote")
    words.add_argument("--base", metavar="RUN", help="also say which of them were trained on this run")
    add_checkpoint(words)
    add_code(words)
    return words


def run(arguments: Namespace) -> dict:
    """Prints a table; returns what it says."""
    from polygpt.cli.output import figure, print_table
    from polygpt.models.adapter_file import AdapterFile
    from polygpt.training.run import open_run

    files = {name: AdapterFile.read(Path(name)) for name in arguments.files}
    base = arguments.base and open_run(arguments.base, arguments.checkpoint, code=arguments.code)
    found = []
    for name, adapter in files.items():
        row = {"file": name, "kind": adapter.kind, "trained": adapter.numbers, "of base": adapter.frozen}
        row |= {"from": adapter.origin}
        found.append(row if base is None else row | {"fits": adapter.misfit(base.params, base.merged_from) or "yes"})
    rows = [[figure(value) for value in row.values()] for row in found]
    print_table("Adapters", list(found[0]), rows, prose=(1, 4, 5))
    return {"adapters": found}
