"""polygpt data check FILE: check every record of every task and suggest settings that would accept them."""

import shlex
from argparse import Namespace
from collections.abc import Iterator

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser
from polygpt.cli.output import figure, print_table
from polygpt.spec import counted

EXAMPLES = """\
examples:
  polygpt data check experiments/quickstart.py
  polygpt data check my_folder.py --json

Of a run with train.phases, tasks are checked again for each phase that changes their rows. Held-out tasks are checked
too. The last lines are two commands with the smallest settings that accept 95 % and 100 % of
each task's records. Where examples share a row, a row gets as many media items as fill it. Exit code 2 if any record is
unusable, or the scores of an example (data.scores) are not its own."""
SHARES = (0.95, 1.0)
NEGLIGIBLE = 1e-6
"""A task with a smaller share of the mixture is not checked: it waits for another phase."""


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
    from polygpt.training.phase import expanded

    tokenizer, adapters, parts = chosen.tokenizer.build(), chosen.model.adapters, expanded(chosen)
    layout = parts[-1].data.layout
    known, held_out, lengths, found = {}, set(), {}, {}
    with Progress("checking") as progress:
        for name, data, phase in _training(parts):
            found |= check(data, tokenizer, parts[phase].model.adapters, progress)
            known[repr((data.layout, data.tasks[name].source))] = name  # mappings have no hash
            lengths[name] = _row_length(chosen, phase)
        for name, task in chosen.evaluation.tasks.items():
            own, walked = layout_of(task, layout), f"evaluation/{name}"
            key = repr((own, task.source))
            if key not in known:
                alone = chosen.data.replace(tasks={walked: Task(task.source)}, layout=own)
                found |= check(alone, tokenizer, adapters, progress)
                known[key] = walked
                common = task.seq_len is None
                lengths[walked] = _row_length(chosen, len(parts) - 1) if common else f"evaluation.tasks.{name}.seq_len"
            held_out.add(known[key])
        scored = _score_faults(parts, tokenizer, progress)
    for fault in [*(fault for findings in found.values() for fault in findings.faults), *scored]:
        print(fault)
    _print_table(found, adapters, layout)
    fits = {f"{share:.0%}": _command(arguments, chosen, found, held_out, lengths, share) for share in SHARES}
    bad, records = sum(len(f.faults) for f in found.values()), sum(f.records for f in found.values())
    if not bad:
        print(f"The present settings accept all {counted(records, 'record')}.")
    faults = [f"{bad} of {records} records are unusable"] if bad else []
    faults += [f"the scores of {counted(len(scored), 'example')} cannot be used"] if scored else []
    print("Smallest settings, by the share of each task's records that they accept:")
    for share, command in fits.items():
        print(f"{share:>5}  {command or 'no usable record'}")
    return {
        "tasks": {
            name: findings.summary() | {"faults": [str(fault) for fault in findings.faults]}
            for name, findings in found.items()
        },
        "commands": fits,
        "scores": scored,
        "fault": f"data check: {' and '.join(faults)}" if faults else None,
    }


def _training(parts) -> Iterator[tuple]:
    """(name, `DataSpec` of it alone, phase) of every training task, again for each phase in which its rows differ."""
    seen = set()
    for phase, part in enumerate(parts):
        total = sum(task.weight for task in part.data.tasks.values())
        for name, task in part.data.tasks.items():
            rows = name, part.data.layout, task.transform, task.prompt_weight, task.paired, part.model.adapters
            if task.weight >= NEGLIGIBLE * total and repr(rows) not in seen:
                seen.add(repr(rows))
                at = f"{name}, phase {phase}" if phase else name
                yield at, part.data.replace(tasks={at: task}), phase


def _score_faults(parts, tokenizer, progress) -> list[str]:
    """A line for each example whose scores cannot be used, in any phase that reads other scores or other rows."""
    from polygpt.data.check import score_faults

    seen, faults = set(), {}
    for part in parts:
        tasks = {name: (task.prompt_weight, task.paired) for name, task in part.data.tasks.items()}
        read = repr((part.data.scores, part.data.layout, tasks, part.model.adapters))
        if part.data.scores and read not in seen:
            seen.add(read)
            faults |= dict.fromkeys(score_faults(part.data, tokenizer, part.model.adapters, progress))
    return list(faults)


def _row_length(chosen, phase: int) -> str:
    """The dotted name of the field that sets the row length of a phase."""
    changed = "data.layout.seq_len"
    for number in reversed(range(phase)):
        if {changed, "data.layout", "data"} & set(chosen.train.phases[number].changes):
            return f"train.phases.{number}.changes.{changed}"
    return changed


def _print_table(found, adapters, layout) -> None:
    rows, labels = [], layout.labels
    for name, findings in found.items():
        lengths = findings.summary()["positions"]
        positions = f"{figure(lengths['median'])}, at most {lengths['max']}" if lengths else "–"
        media = [f"{findings.media[modality]:,}" for modality in adapters]
        labelled = [f"{findings.labelled[label]:,}" for label in labels]
        labelled += [f"{findings.paired:,}"] if layout.pairs else []
        rows.append([name, f"{findings.records:,}", f"{len(findings.faults):,}", *media, *labelled, positions])
    headings = ["task", "records", "unusable", *adapters, *(f"with {label}" for label in labels)]
    headings += ["pairs", "positions (median)"] if layout.pairs else ["positions (median)"]
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
    length = max((wanted[field] for field in set(lengths.values()) & set(wanted)), default=0)
    for name, stack in chosen.model.stacks().items():
        limit = stack.position.limit()
        if limit is not None and length > limit == getattr(stack.position, "length", None):
            wanted[f"model.{name}.position.length"] = length
    training = {name for name in found if not name.startswith("evaluation/")}
    for kind, tasks in (("data", training), ("evaluation", held_out)):
        if left_out & tasks and getattr(chosen, kind).on_bad_record == "raise":
            wanted[f"{kind}.on_bad_record"] = "skip"
    words = [word for name, value in (arguments.changes | wanted).items() for word in (f"--{name}", str(value))]
    return shlex.join(["polygpt", "train", arguments.file, *words])
