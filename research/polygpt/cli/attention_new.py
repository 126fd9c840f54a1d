"""polygpt attention new NAME: a starting file for a variant of your own."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser

EXAMPLES = """\
examples:
  polygpt attention new NearFirst                 near_first.py: a mask and a score modification
  polygpt attention new Gated --kind module       gated.py: a custom module around the inherited kernels
  polygpt attention new Fading --kind recurrent   fading.py: a recurrent state with a custom decay"""


KINDS = ("mask", "module", "recurrent")
"""Copied from `lab/starter.py`, so that --help need not import it."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("name", metavar="NAME", help="name of the class, such as NearFirst")
    words.add_argument("--kind", choices=KINDS, default="mask", help="what it changes (default: mask)")
    words.add_argument("--folder", default=".", metavar="D", help="where to write it (default: current folder)")
    return words


def run(arguments: Namespace) -> dict:
    """Writes the file; returns its path and the command that checks it."""
    from polygpt.lab.starter import write

    path, name = write(arguments.name, arguments.kind, Path(arguments.folder))
    command = f"polygpt attention check {path}:{name}"
    print(f"written: {path}\nnext:    {command}")
    return {"file": path, "check": command}
