"""polygpt adapter save RUN FILE: write what a run trained beside its frozen base."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser
from polygpt.cli.evaluate import add_checkpoint, add_code

EXAMPLES = """\
examples:
  polygpt adapter save runs/french french.npz
  polygpt evaluate runs/quickstart --adapter french.npz

A run with model.low_rank or model.prefix trains little beside the frozen parameters of the run that it started from
(init). The file holds only that. Several adapters of one base are used with it one at a time, by --adapter."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("run", metavar="RUN", help="run folder of the fine-tuned model")
    words.add_argument("file", metavar="FILE", help="file to write, such as french.npz")
    add_checkpoint(words)
    add_code(words)
    return words


def run(arguments: Namespace) -> dict:
    """Writes the file; returns its path and sizes."""
    from polygpt.training.adapter import save_adapter

    saved = save_adapter(arguments.run, arguments.file, arguments.checkpoint, arguments.code)
    print(f"{arguments.file}: {saved.numbers:,} trained numbers beside a base of {saved.frozen:,}, from {saved.origin}")
    return {"file": Path(arguments.file), "trained": saved.numbers, "base": saved.frozen, "origin": saved.origin}
