"""polygpt tune FILE: search for the best values of some fields."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser, change
from polygpt.cli.launch import count
from polygpt.cli.output import print_table
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt tune experiments/quickstart.py --dimension optim.schedule.peak_lr=log:1e-4:1e-2
  polygpt tune experiments/quickstart.py --dimension optim.clip=log:0.1:10 --trials 40 --workers 4 --pruning median
  polygpt tune experiments/quickstart.py --dimension model.decoder.depth=int:2:6 --against flops    a Pareto front

FILE may define `def search() -> Search` with its dimensions. On the command line a dimension is FIELD=float:LOW:HIGH,
log:LOW:HIGH, int:LOW:HIGH[:STEP] or choice:A,B,... Any other --name value sets a field of the base experiment. The same
command resumes a search that was stopped or killed; a larger --trials adds trials. Several commands may share one
--folder."""

SETTINGS = ("metric", "better", "against", "trials", "sampler", "seed", "pruning")
"""Options that set fields of a search."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, _fields)
    words.add_argument("file", metavar="FILE", help="a Python file with `def search()`, or `def experiment()`")
    words.add_argument("--dimension", metavar="FIELD=RANGE", action="append", default=[], help="a field and its range")
    words.add_argument("--trials", metavar="N", type=count, help="total number of trials (default: 20)")
    words.add_argument("--workers", metavar="N", type=count, default=1, help="processes on this machine (default: 1)")
    words.add_argument("--folder", metavar="DIR", help="folder of the search (default: tuned/<experiment name>)")
    words.add_argument("--metric", metavar="M", help="task/measure, or train/loss (default: text/loss)")
    words.add_argument("--better", choices=("lower", "higher"), help="which values are better (default: declared)")
    words.add_argument("--against", choices=("flops", "parameters"), help="a second objective to minimise")
    words.add_argument("--pruning", choices=("median", "halving"), help="prune poor trials")
    words.add_argument("--sampler", choices=("tpe", "random", "qmc", "nsga2"), help="algorithm that proposes values")
    words.add_argument("--seed", metavar="N", type=int, help="seed of the sampler")
    return words


def run(arguments: Namespace) -> dict:
    """Searches; returns the best trials and all others."""
    from polygpt.ablation.tuning.storage import load_optuna

    load_optuna()  # first, to fail before slow imports if it is missing
    search = _search(arguments)
    folder = Path(arguments.folder or Path("tuned") / search.base.name)

    from polygpt.ablation.tuning import report, summary
    from polygpt.ablation.tuning.run import run as run_search
    from polygpt.cli.tune_progress import Progress

    with Progress(search) as progress:
        try:
            storage = run_search(search, folder, workers=arguments.workers, callback=progress)
        except KeyboardInterrupt:
            return {"folder": folder, "interrupted": "interrupted, saved: the same command resumes"}
    found = summary.summarize(storage)
    place = report.write(found, folder)
    for title, columns, rows in report.tables(found):
        print_table(title, columns, rows)
    if found.importance and (complete := len(storage.complete_ones())) < report.ROUGH:
        print(report.CAVEAT.format(complete))
    if found.failed:
        print(f"{len(found.failed)} trials failed and do not count, possibly because of the machine: see the report")
    if not found.best:
        reasons = sorted({trial["reason"] for trial in found.trials})
        return {"folder": folder, "fault": f"no trial completed: {reasons[0]}: see {place}"}
    if len(found.best) == 1 and (words := found.command(found.trial(found.best[0]))) is not None:
        print(f"train with these values: polygpt train {arguments.file} {' '.join(words)}")
    print(f"report: {place}")
    return found.to_json() | {"folder": folder, "report": place}


def _search(arguments: Namespace):
    from polygpt.ablation.tune import load_search

    dimensions = {}
    for text in arguments.dimension:
        name, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"--dimension {text}: write FIELD=RANGE, such as optim.schedule.peak_lr=log:1e-4:1e-2")
        dimensions[name] = values
    base = _base(arguments.file, arguments.changes, arguments.options)
    settings = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    return load_search(arguments.file, dimensions, base, **settings)


def _base(file: str, changes: Mapping[str, str], options: Sequence[str]):
    """The base experiment: the search's own, or the file's, with overrides."""
    from polygpt.ablation.tune import Search, find_search

    made = find_search(file)
    if isinstance(made, Search):
        return change(made.base, changes, options)
    return experiment.load(file, changes, options)


def _fields(file: str | None, changes: Mapping[str, str], options: Sequence[str]):
    return _base(file, changes, options) if file else None
