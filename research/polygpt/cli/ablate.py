"""polygpt ablate SLUG: run an ablation, test its claims and write its README; finished runs are not repeated."""

import importlib
import pkgutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence

from polygpt.cli.arguments import Parser, change
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt ablate --list                                 ablations with their questions and verdicts
  polygpt ablate glu
  polygpt ablate glu --seeds 10                         more seeds than the default
  polygpt ablate mine.py --engine processes --workers 4
  polygpt ablate glu --engine slurm --slurm.minutes 60
  polygpt ablate glu --only geglu --json

Each finished run is appended to results.jsonl next to the ablation's file. The same command resumes an interrupted
ablation. NAME --help lists the fields of all engines."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, fields)
    words.add_argument(
        "file", metavar="SLUG|FILE", nargs="?", help="a folder in experiments/ablations, or a Python file"
    )
    words.add_argument("--list", action="store_true", help="list the ablations")
    words.add_argument("--seeds", type=int, metavar="N", help="runs per point (default: the ablation's)")
    words.add_argument("--only", action="append", metavar="VARIANT", help="run only this variant; may be repeated")
    words.add_argument("--engine", default="inline", metavar="NAME", help="inline, processes, slurm or ray")
    strict = "refuse runs made with different, unknown or uncommitted library source"
    words.add_argument("--strict-code", action="store_true", help=strict)
    words.add_argument("--workers", type=int, metavar="N", help="number of workers, for engines with workers")
    return words


def fields(file: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """The fields of all engines by engine, for `--help`."""
    return change(_engines(), changes, options) if file else None


def run(arguments: Namespace) -> dict:
    """Performs missing runs, prints and writes the results; returns them."""
    if arguments.list or not arguments.file:
        return _list()
    from polygpt.ablation import index, provenance, readme, results, runner
    from polygpt.ablation.live import Live
    from polygpt.ablation.study import PLACE, find_ablation, load_ablation

    file = find_ablation(arguments.file)
    ablation, folder = load_ablation(file), readme.home(file)
    engine = _engine(arguments)
    if arguments.seeds is not None and arguments.seeds < 1:
        raise UserError(f"ablate: --seeds is {arguments.seeds}: it must be at least 1")
    seeds = arguments.seeds or ablation.seeds
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / results.RESULTS
    planned = []
    with Live(ablation, seeds, results.frame(ablation, results.read(path), range(seeds)).records) as live:

        def callback(event) -> None:
            planned.extend([event] if isinstance(event, runner.Planned) else [])
            live(event)

        part, how = _part(ablation, arguments.only), {"engine": engine, "strict_code": arguments.strict_code}
        runner.run_all(part, folder, seeds=seeds, callback=callback, **how)
    made = sum(event.runs - event.done for event in planned)
    runs = sum(event.runs for event in planned)
    done = f"{made} runs finished" if made else f"nothing to run: all {runs} runs are in {path}"
    frame = results.frame(ablation, results.read(path))
    faults = provenance.faults(readme.runs_made(frame, readme.tuning(ablation, results.read(path))))
    written = readme.write(folder, frame)
    indexed = index.write(PLACE.parent) if folder.resolve().parent == PLACE.resolve() else None
    found = _print(frame, readme.title(file))
    for fault in faults:
        print(f"{fault} {readme.REMEDY}", file=sys.stderr)
    print(done)
    print(f"written: {', '.join(map(str, [*written, *([indexed] if indexed else [])]))}")
    counts = {"ablation": folder.resolve().name, "runs": runs, "made": made}
    return {**counts, **found, "code": faults, "folder": folder}


def _print(frame, title: str) -> dict:
    import dataclasses

    from polygpt.ablation.summary import rows, verdicts
    from polygpt.ablation.tables import claims_table, costs_table, headline, results_table
    from polygpt.cli.output import show_table

    found = verdicts(frame)
    print(f"{title}\n{frame.ablation.question}\n")
    for table in [results_table(frame), costs_table(frame), *([claims_table(found)] if found else [])]:
        show_table(table)
        print("\n".join(table.notes) + "\n")
    said = headline(frame, found)
    print(said)
    return {
        "question": frame.ablation.question,
        "verdict": said,
        "seeds": frame.seeds,
        "rows": [dataclasses.asdict(row) for row in rows(frame)],
        "claims": [{**dataclasses.asdict(one), "claim": one.claim.text, "says": one.claim.says} for one in found],
    }


def _part(ablation, only: Sequence[str] | None):
    """The ablation with only the variants asked for."""
    from polygpt.spec import nearest

    for name in only or ():
        if name not in ablation.variants:
            raise UserError(f"ablate: --only {name}: no such variant: {nearest(name, ablation.variants)}")
    if not only:
        return ablation
    kept = {name: changes for name, changes in ablation.variants.items() if name in only}
    return ablation.replace(variants=kept, claims=())


def _list() -> dict:
    import dataclasses

    from polygpt.ablation.index import entries
    from polygpt.ablation.study import PLACE
    from polygpt.cli.output import print_table
    from polygpt.markup import plain_text

    found = entries(PLACE.parent)
    rows = [[one.slug, plain_text(one.question), plain_text(one.verdict) or "not run yet"] for one in found]
    if found:
        print_table(f"Ablations in {PLACE}", ["ablation", "question", "verdict"], rows, prose=(1, 2))
    else:
        print(f"no ablations in {PLACE}: run polygpt in the parent of that folder, or polygpt ablate FILE")
    return {"ablations": [dataclasses.asdict(one) for one in found]}


# --- engines ----------------------------------------------------------------------------------------------------------


def _classes() -> dict[str, type]:
    """Engine classes by the name of their file."""
    from polygpt.ablation import engines
    from polygpt.ablation.engines.base import Engine

    found = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(engines.__path__)):
        module = importlib.import_module(f"{engines.__name__}.{name}")
        for cls in vars(module).values():
            own = isinstance(cls, type) and cls.__module__ == module.__name__
            if own and issubclass(cls, Engine) and cls is not Engine:
                found[name] = cls
    return found


def _engines():
    """A specification with one field per engine, so that `--slurm.minutes 60` sets a field of that engine."""
    import dataclasses

    from polygpt.spec import Spec

    members = [(name, cls, dataclasses.field(default=cls())) for name, cls in _classes().items()]
    return dataclasses.make_dataclass("Engines", members, bases=(Spec,), frozen=True)()


def _engine(arguments: Namespace):
    from polygpt.spec import hints, nearest

    engines = change(_engines(), arguments.changes, arguments.options)
    name = arguments.engine
    if name not in hints(type(engines)):
        raise UserError(f"ablate: no engine {name!r}: {nearest(name, hints(type(engines)))}")
    for field in arguments.changes:
        if field.partition(".")[0] != name:
            raise UserError(f"ablate: --{field} has no effect with --engine {name}")
    engine = getattr(engines, name)
    if arguments.workers is None:
        return engine
    if "workers" not in hints(type(engine)):
        raise UserError(f"ablate: --engine {name} has no workers: omit --workers")
    return engine.replace(workers=arguments.workers)
