"""polygpt data check FILE: check every record of every task and suggest settings that would accept them."""

import shlex
from argparse import Namespace

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser
from polygpt.cli.output import figure, print_table
from polygpt.spec import counted

EXAMPLES = """\
examples:
  polygpt data check experiments/quickstart.py
  polygpt data check my_folder.py --json

Held-out tasks are checked too. The last lines are two commands with the smallest settings that accept 95 % and 100 % of
each task's records. Where examples share a row, a row gets as many media items as fill it. Exit code 2 if any record is
unusable."""
SHARES = (0.95, 1.0)


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, experiment.fields)
    words.add_argument("file", metavar="FILE", help="a Python file with `def experiment() -> Experiment`")
    return words


def run(arguments: Namespace) -> dict:
    """Prints faults, a table and the commands; returns them, with a `fault` if there are any."""
    chosen = experiment.load(arguments.file, arguments.changes, arguments.options)

    from polygpt.cli.progress import Progress
    from polygpt.data.check import check
    from polygpt.data.loader import Task
    from polygpt.evaluation.conditions import layout_of

    data, tokenizer, adapters = chosen.data, chosen.tokenizer.build(), chosen.model.adapters
    known = {repr((data.layout, task.source)): name for name, task in data.tasks.items()}  # mappings have no hash
    held_out, lengths = set(), dict.fromkeys(data.tasks, "data.layout.seq_len")
    with Progress("checking") as progress:
        found = check(data, tokenizer, adapters, progress)
        for name, task in chosen.evaluation.tasks.items():
            layout, walked = layout_of(task, data.layout), f"evaluation/{name}"
            key = repr((layout, task.source))
            if key not in known:
                alone = data.replace(tasks={walked: Task(task.source)}, layout=layout)
                found |= check(alone, tokenizer, adapters, progress)
                known[key] = walked
                lengths[walked] = "data.layout.seq_len" if task.seq_len is None else f"evaluation.tasks.{name}.seq_len"
            held_out.add(known[key])
    for findings in found.values():
        for fault in findings.faults:
            print(fault)
    _print_table(found, adapters, data.layout.labels)
    fits = {f"{share:.0%}": _command(arguments, chosen, found, held_out, lengths, share) for share in SHARES}
    bad, records = sum(len(f.faults) for f in found.values()), sum(f.records for f in found.values())
    if not bad:
        print(f"The present settings accept all {counted(records, 'record')}.")
    print("Smallest settings, by the share of each task's records that they accept:")
    for share, command in fits.items():
        print(f"{share:>5}  {command or 'no usable record'}")
    return {
        "tasks": {
            name: findings.summary() | {"faults": [str(fault) for fault in findings.faults]}
            for name, findings in found.items()
        },
        "commands": fits,
        "fault": f"data check: {bad} of {records} records are unusable" if bad else None,
    }


def _print_table(found, adapters, labels) -> None:
    rows = []
    for name, findings in found.items():
        lengths = findings.summary()["positions"]
        positions = f"{figure(lengths['median'])}, at most {lengths['max']}" if lengths else "–"
        media = [f"{findings.media[modality]:,}" for modality in adapters]
        labelled = [f"{findings.labelled[label]:,}" for label in labels]
        rows.append([name, f"{findings.records:,}", f"{len(findings.faults):,}", *media, *labelled, positions])
    headings = ["task", "records", "unusable", *adapters, *(f"with {label}" for label in labels), "positions (median)"]
    print_table("Records", headings, rows)
    for name, findings in found.items():
        if files := findings.unread:
            print(f"{name}: no record refers to {len(files)} media files in its folder, such as {files[0]}")
    for modality in adapters:
        if not any(findings.media[modality] for findings in found.values()):
            print(f"no record has media for the adapter {modality!r}, so it is not trained")
    for label in labels:
        if not any(findings.labelled[label] for findings in found.values()):
            print(f"no record has the label {label!r} of data.layout.labels")


def _command(arguments, chosen, found, held_out, lengths, share) -> str | None:
    """`polygpt train` with the given overrides plus those that accept a share of the records; None if there are
    none."""
    from polygpt.data.check import fitting

    if not any(len(findings.needs) for findings in found.values()):
        return None
    wanted, left_out = fitting(found, chosen.model.adapters, share, lengths)
    length = wanted.get("data.layout.seq_len", 0)
    for name, stack in chosen.model.stacks().items():
        limit = stack.position.limit()
        if limit is not None and length > limit == getattr(stack.position, "length", None):
            wanted[f"model.{name}.position.length"] = length
    for kind, tasks in (("data", set(chosen.data.tasks)), ("evaluation", held_out)):
        if left_out & tasks and getattr(chosen, kind).on_bad_record == "raise":
            wanted[f"{kind}.on_bad_record"] = "skip"
    words = [word for name, value in (arguments.changes | wanted).items() for word in (f"--{name}", str(value))]
    return shlex.join(["polygpt", "train", arguments.file, *words])
