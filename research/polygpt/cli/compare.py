"""polygpt compare RUN RUN ...: group finished runs by configuration and compare the groups over their seeds."""

from argparse import Namespace

from polygpt.cli.arguments import Parser
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt compare runs/mha-0 runs/mha-1 runs/gqa-0 runs/gqa-1
  polygpt compare runs/* --metric fusion/accuracy
  polygpt compare runs/small runs/large --json

Runs whose configurations differ only in the seed form a group. Every group is compared with that of the first run."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES)
    words.add_argument("runs", metavar="RUN", nargs="+", help="run folders, such as runs/quickstart")
    words.add_argument("--metric", help="task/measure or train/loss (default: the first held-out task's loss)")
    declared = "which values are better (default: as the metric declares)"
    words.add_argument("--better", choices=("lower", "higher"), help=declared)
    return words


def run(arguments: Namespace) -> dict:
    """Compares, prints; returns the groups."""
    import dataclasses

    from polygpt.ablation.compare import compare_runs, tables
    from polygpt.cli.output import show_table

    if len(arguments.runs) < 2:
        raise UserError(f"compare: {arguments.runs[0]} alone: name at least two runs")
    found = compare_runs(arguments.runs, arguments.metric, arguments.better)
    for table in tables(found):
        show_table(table)
        print("".join(f"{note}\n" for note in table.notes))
    groups = [
        {
            "name": group.name,
            "runs": [run.folder for run in group.runs],
            "seeds": [run.seed for run in group.runs],
            "values": group.values,
            "how": group.how,
            "better": group.better,
            "adjusted": group.adjusted,
            "seeds_needed": group.seeds_needed,
            "seeds_range": group.seeds_range,
            "compared": group.compared and dataclasses.asdict(group.compared),
        }
        for group in found.groups
    ]
    said = {"metric": found.metric, "better": found.better, "notes": found.notes}
    return {**said, "groups": groups, "differences": found.differences}
