"""polygpt data check FILE: every record of every task, and what is wrong with it."""

from argparse import Namespace

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser
from polygpt.cli.output import figure, print_table

EXAMPLES = """\
examples:
  polygpt data check experiments/quickstart.py
  polygpt data check my_folder.py --json

The held-out tasks are walked too. Exit code 2 if any record cannot be used."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, experiment.fields)
    words.add_argument("file", metavar="FILE", help="a Python file with `def experiment() -> Experiment`")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the faults and a table; returns both, with a `fault` if there is any."""
    chosen = experiment.load(arguments.file, arguments.changes, arguments.options)

    from polygpt.cli.progress import Progress
    from polygpt.data.check import check
    from polygpt.data.loader import Task

    data = chosen.data
    known = [task.source for task in data.tasks.values()]
    held_out = {f"evaluation/{n}": Task(t.source) for n, t in chosen.evaluation.tasks.items() if t.source not in known}
    data = data.replace(tasks={**data.tasks, **held_out})
    with Progress("checking") as progress:
        found = check(data, chosen.tokenizer.build(), chosen.model.adapters, progress)
    for findings in found.values():
        for fault in findings.faults:
            print(fault)
    rows = []
    for name, findings in found.items():
        lengths = findings.summary()["positions"]
        positions = f"{figure(lengths['median'])}, at most {lengths['max']}" if lengths else "–"
        rows.append([name, f"{findings.records:,}", f"{len(findings.faults):,}", positions])
    print_table("Records", ["task", "records", "cannot be used", "positions (median)"], rows)
    bad, records = sum(len(f.faults) for f in found.values()), sum(f.records for f in found.values())
    return {
        "tasks": {
            name: findings.summary() | {"faults": [str(fault) for fault in findings.faults]}
            for name, findings in found.items()
        },
        "fault": f"data check: {bad} of {records} records cannot be used" if bad else None,
    }
