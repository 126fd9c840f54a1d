"""polygpt plan check FOLDER: recompile committed plans and compare."""

import os
from argparse import Namespace
from pathlib import Path

from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table

EXAMPLES = """\
examples:
  polygpt plan check
  polygpt plan check experiments/plans/1b

Recompiles every plan in a folder from the experiment and overrides stored in it. It fails if memory per device or
bytes sent grew by more than 5 %, or if a fused kernel is missing. Unchanged programs come from the cache in
seconds. Otherwise, on two cores, a small preset takes seconds to minutes, a large one minutes, and all plans
together an hour or more."""

DEFAULT = "experiments/plans"
"""Folder of the committed plans."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument(
        "folder", metavar="FOLDER", nargs="?", default=DEFAULT, help=f"folder with plans (default: {DEFAULT})"
    )
    return words


def run(arguments: Namespace) -> dict:
    """Compares; the result has a `fault` if something got worse."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from polygpt.scale.plan.check import TOLERANCE, compare, plans_below
    from polygpt.scale.plan.tables import gib

    found = [compare(path) for path in plans_below(Path(arguments.folder))]
    rows = []
    for one in found:
        memory = f"{gib(one.memory[0])} -> {gib(one.memory[1])}"
        sent = f"{one.sent[0] / 1e9:,.2f} -> {one.sent[1] / 1e9:,.2f}"
        rows.append([str(one.path), memory, sent, one.regressions or "unchanged"])
    print_table(f"{len(rows)} plans", ["plan", "memory per device", "GB sent per device and step", "result"], rows)
    worse = [f"{one.path}: {one.regressions}" for one in found if one.regressions]
    limit = f"(limit {TOLERANCE:.0%})"
    plans = [
        {"path": one.path, "memory": one.memory, "sent": one.sent, "regressions": one.regressions} for one in found
    ]
    return {"plans": plans, "fault": f"plan check: {'; '.join(worse)} {limit}" if worse else None}
