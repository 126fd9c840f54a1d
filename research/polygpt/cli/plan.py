"""polygpt plan FILE --on SLICE: memory, time and collectives of a training step on devices you need not have."""

import json
import math
import os
import sys
from argparse import Namespace
from pathlib import Path

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser
from polygpt.cli.output import show_table
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt plan experiments/presets/7b.py --on v5e:16x16
  polygpt plan experiments/presets/7b.py --on v5e:16x16 --search
  polygpt plan experiments/presets/1b.py --on v5p:4x4x4 --slices 2 --train.mesh.fsdp 16 --train.mesh.data -1
  polygpt plan experiments/quickstart.py --on cpu:8 --train.parallel sharded

The TPU compiler comes with `pip install -e '.[tpu]'` and needs no TPU. --on accepts v4, v5e, v5p, v6e or tpu7x with a
slice topology; h100:8, h200:8, a100:8 and cpu:8 are compiled for virtual CPU devices, and estimates are marked."""

BUDGET = 780
"""Time limit of a search, in seconds."""
LIMIT = 3600
"""Time limit of one compilation, in seconds."""
NEAREST = 300
"""Seconds for compiling alternatives if the program does not fit."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, experiment.fields)
    words.add_argument("file", metavar="FILE", help="a Python file with `def experiment() -> Experiment`")
    words.add_argument("--on", metavar="SLICE", required=True, help="v5e:16x16, v5p:4x4x4, h100:8, cpu:8, ...")
    words.add_argument(
        "--slices", type=int, default=1, metavar="N", help="number of slices, connected by the data-center network"
    )
    experiment.add_phase(words)
    words.add_argument("--search", action="store_true", help="find the fastest mesh, stages, remat and microbatches")
    words.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds to search (default: {BUDGET})"
    )
    words.add_argument("--output", metavar="DIR", help="output folder (default: plans/<experiment>-<slice>)")
    return words


def run(arguments: Namespace) -> dict:
    """Plans, prints, writes; returns the plan as data."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on the accelerator, which may be busy
    from polygpt.scale.plan.target import target

    on = target(arguments.on, arguments.slices)
    if arguments.budget <= 0:
        raise UserError(f"plan: --budget is {arguments.budget:g}: it must be positive")
    chosen = experiment.load(arguments.file, arguments.changes, arguments.options)
    chosen, said = experiment.of_phase(chosen, arguments.phase, "plan")
    if said:
        _report(said)
    on.prepare()
    slices = f"-{arguments.slices}x" if arguments.slices > 1 else "-"
    part = f"-phase-{arguments.phase}" if arguments.phase else ""
    folder = Path(arguments.output or Path("plans") / f"{chosen.name}{part}{slices}{arguments.on.replace(':', '-')}")
    data, found = _searched(chosen, on, arguments.budget) if arguments.search else (_planned(chosen, on), None)
    data |= {"file": arguments.file, "changes": arguments.changes | data.get("best", {}), "phase": arguments.phase}
    _print(data, found)
    _write(data, found, folder)
    print(f"written to {folder}")
    return data | {"folder": folder}


def _planned(chosen, on) -> dict:
    from polygpt.scale.plan import search
    from polygpt.scale.plan.worker import plan_in_subprocess

    _report(f"compiling {chosen.name} for {on.name}{f' x {on.slices}' if on.slices > 1 else ''} ...")
    data = plan_in_subprocess(chosen, on, LIMIT)  # in its own process: the compiler may crash or hang
    if "failed" in data:
        raise UserError(f"plan: {on.name}: compilation failed: {data['failed']}")
    if data["memory"] is None or not data["memory"]["fits"]:
        _report("does not fit; looking for the smallest changes that do")
        data["nearest"] = search.nearest(chosen, on, data, NEAREST, _report)
    return data


def _searched(chosen, on, budget: float):
    from polygpt.scale.plan import search

    found = search.search(chosen, on, budget, _report)
    if found.best is None:
        raise UserError(f"plan: {on.name}: {nothing_found(found, budget)}")
    best = found.best.candidate
    return found.best.data | {"best": best.overrides(chosen), "searched": len(found.trials)}, found


def nothing_found(found, budget: float) -> str:
    """Why a search within `budget` seconds found nothing, and the remedy."""
    from polygpt.scale.plan.worker import TIMED_OUT
    from polygpt.spec import counted

    failures = [way.data["failed"] for way in found.compiled if "failed" in way.data]
    late = sum(failure.startswith(TIMED_OUT) for failure in failures)
    refused = len(found.compiled) - len(failures)
    longer = f"a larger --budget than {budget:g} s, such as --budget {max(BUDGET, math.ceil(3 * budget))}"
    if not found.compiled:
        return f"no compilation was started in time: use {longer}"
    if refused:
        more = f"; {counted(late, 'compilation')} did not finish in time: or use {longer}" if late else ""
        return (
            f"none of {counted(refused, 'compiled candidate')} fits ({len(found.trials)} were predicted): "
            f"use a larger slice or a smaller --data.batch_size{more}"
        )
    if late:
        return f"no compilation finished in time ({late} stopped): use {longer}"
    return f"compilation failed: {failures[0]}"


def _print(data: dict, found) -> None:
    from polygpt.scale.plan.tables import headline, searched, summary_lines, tables

    print(headline(data))
    for line in summary_lines(data):
        print(f"  {line}")
    for table in [*tables(data), *([searched(found)] if found else [])]:
        show_table(table)
        for note in table.notes:
            print(note + "\n")
    if data.get("best"):
        print("to train this way: " + " ".join(f"--{name} {value}" for name, value in data["best"].items()))


def _write(data: dict, found, folder: Path) -> None:
    from polygpt.files import plain, write_atomically
    from polygpt.scale.plan.pictures import draw_plan, draw_search
    from polygpt.scale.plan.tables import markdown

    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    if data["memory"]:
        draw_plan(data, folder / "plan.png")
        pictures.append("plan.png")
    if found:
        draw_search(found, folder / "search.png")
        pictures.append("search.png")
    write_atomically(folder / "plan.json", json.dumps(plain(data), indent=1) + "\n")
    write_atomically(folder / "plan.md", markdown(data, found, pictures))


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
