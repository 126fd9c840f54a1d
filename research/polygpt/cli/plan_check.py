"""polygpt plan check FOLDER: compiles committed plans again and compares."""

import os
from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table

EXAMPLES = """\
examples:
  polygpt plan check
  polygpt plan check experiments/plans/1b

Compiles every plan below a folder again, from the experiment and overrides that it names. Memory of a device, or bytes
of collectives, that grew by more than 5 % are an error, and so is a fused kernel that is there no more. It takes
seconds for a program that was compiled before and is as it was; else, on two cores, seconds to minutes for a plan of a
small preset and minutes for one of a large: an hour or more for them all."""

DEFAULT = "experiments/plans"
"""Where plans are committed."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument(
        "folder", metavar="FOLDER", nargs="?", default=DEFAULT, help=f"where the plans are (default: {DEFAULT})"
    )
    return words


def run(arguments: Namespace) -> dict:
    """Compares; the result has a fault where something grew."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from polygpt.scale.plan.check import GROWTH, check, plans_below
    from polygpt.scale.plan.tables import gib

    found = [check(path) for path in plans_below(Path(arguments.folder))]
    rows = []
    for one in found:
        memory = f"{gib(one.memory[0])} -> {gib(one.memory[1])}"
        sent = f"{one.sent[0] / 1e9:,.2f} -> {one.sent[1] / 1e9:,.2f}"
        rows.append([str(one.path), memory, sent, one.worse or "as it was"])
    print_table(f"{len(rows)} plans", ["plan", "memory of a device", "GB sent per device and step", "result"], rows)
    worse = [f"{one.path} {one.worse}" for one in found if one.worse]
    fault = f"plan check: grown means by more than {GROWTH:.0%}: {'; '.join(worse)}" if worse else None
    plans = [
        {"path": one.path, "memory": one.memory, "sent": one.sent, "grew": one.grew, "gone": one.gone} for one in found
    ]
    return {"plans": plans, "fault": fault}
