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
    from polygpt.evaluation.conditions import layout_of

    data, tokenizer, adapters = chosen.data, chosen.tokenizer.build(), chosen.model.adapters
    known = [(data.layout, task.source) for task in data.tasks.values()]
    with Progress("checking") as progress:
        found = check(data, tokenizer, adapters, progress)
        for name, task in chosen.evaluation.tasks.items():
            layout = layout_of(task, data.layout)
            if (layout, task.source) not in known:
                held_out = data.replace(tasks={f"evaluation/{name}": Task(task.source)}, layout=layout)
                found |= check(held_out, tokenizer, adapters, progress)
                known.append((layout, task.source))
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
