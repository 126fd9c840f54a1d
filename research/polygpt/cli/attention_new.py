"""polygpt attention new NAME: a starting file for a variant of your own."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser

EXAMPLES = """\
examples:
  polygpt attention new NearFirst                 near_first.py: a mask and a score modification
  polygpt attention new Gated --kind module       gated.py: a module of its own around the inherited kernels
  polygpt attention new Fading --kind recurrent   fading.py: a state along the row, with a decay of its own"""


KINDS = ("mask", "module", "recurrent")
"""As in `lab/starter.py`, which help does not wait for."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("name", metavar="NAME", help="the name of the class, as in NearFirst")
    words.add_argument("--kind", choices=KINDS, default="mask", help="what it changes (default: mask)")
    words.add_argument("--folder", default=".", metavar="D", help="where to write it (default: here)")
    return words


def run(arguments: Namespace) -> dict:
    """Writes the file; returns its path and the command that checks it."""
    from polygpt.lab.starter import write

    path, name = write(arguments.name, arguments.kind, Path(arguments.folder))
    command = f"polygpt attention check {path}:{name}"
    print(f"written: {path}\nnext:    {command}")
    return {"file": path, "check": command}
