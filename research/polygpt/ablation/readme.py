"""Writes an ablation's README, plots and LaTeX tables from its file and its results.

Each `polygpt ablate` regenerates everything, except the notes between two markers in the README.
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polygpt.ablation import provenance, results
from polygpt.ablation.beside import beside
from polygpt.ablation.charts import Chart, charts
from polygpt.ablation.claims import Verdict
from polygpt.ablation.pictures import draw, fingerprint, fingerprint_of
from polygpt.ablation.results import Frame
from polygpt.ablation.study import FILE, PLACE, Ablation, load_ablation, places
from polygpt.ablation.summary import missing, verdicts
from polygpt.ablation.tables import claims_table, costs_table, headline, results_table
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.markup import (
    Table,
    duration,
    escaped_markdown,
    latex,
    markdown,
    short,
)
from polygpt.spec import load_file

README, LATEX = "README.md", "table.tex"
NOTES = ("<!-- notes: written by hand, kept -->", "<!-- end of notes -->")
WRITTEN = "<!-- Written by polygpt ablate: changes are overwritten, except in the notes at the end. -->"
EVIDENCE = {
    "V": "verified in the paper",
    "A": "from the paper's abstract or a summary, not verified in the paper",
    "M": "from memory, not yet verified in the paper",
}
REMEDY = "To repeat them, remove their lines from results.jsonl."
LONG = 24
"""Number of rows from which a table is collapsed."""
SUFFIXES = (".svg", ".png")


def home(file: Path) -> Path:
    """The folder of an ablation's results: that of its file if called experiment.py, otherwise one with the file's
    name."""
    return file.parent if file.name == FILE else file.with_suffix("")


def source(folder: Path) -> Path:
    """The ablation file for a results folder; the inverse of `home`."""
    beside = folder.with_name(f"{folder.name}.py")
    return beside if beside.is_file() and not (folder / FILE).is_file() else folder / FILE


def write(folder: Path, frame: Frame | None = None) -> list[Path]:
    """Writes README.md, table.tex and the plots; removes outdated plots.

    Args:
        folder: folder of the results.
        frame: the results, if already read.

    Returns:
        The files written.

    Raises:
        UserError: a README.md exists that was written by hand; also from `load_ablation` and `frame`.
    """
    kept = _read(folder / README)
    if kept is not None and WRITTEN.partition(":")[0] not in kept:
        raise UserError(f"{folder / README} was not written by polygpt ablate: move it away to keep it")
    frame = frame or _frame(folder)
    shown = charts(frame)
    drawn = {f"{chart.name}{suffix}": content for chart in shown for suffix, content in [draw(chart)]}
    texts = _texts(folder, frame, {Path(name).stem: name for name in drawn})
    for path in _pictures(folder):
        if path.name not in drawn:
            path.unlink()
    for name, content in {**drawn, **texts}.items():
        write_atomically(folder / name, content)
    return [folder / name for name in (*texts, *drawn)]


def stale(folder: Path) -> list[str]:
    """The files that `write` would change, one line each; [] if all are up to date or nothing was run.

    Plots are compared by content, because the bytes depend on the version of Matplotlib.
    """
    if not (folder / results.RESULTS).is_file() and not (folder / README).exists():
        return []
    frame = _frame(folder)
    found = {path.stem: path for path in _pictures(folder)}
    shown = {chart.name: chart for chart in charts(frame)}
    texts = _texts(folder, frame, {name: path.name for name, path in found.items()})
    lines = [str(folder / name) for name, text in texts.items() if _read(folder / name) != text]
    for name in sorted({*shown, *found}):
        same = name in shown and name in found and fingerprint_of(found[name].read_bytes()) == fingerprint(shown[name])
        if not same:
            lines.append(str(found.get(name, folder / name)))
    return lines


def _frame(folder: Path) -> Frame:
    return results.frame(load_ablation(source(folder)), results.read(folder / results.RESULTS))


def _pictures(folder: Path) -> list[Path]:
    """All plots drawn by `write`."""
    files = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
    return [path for path in files if fingerprint_of(path.read_bytes()) is not None]


def _texts(folder: Path, frame: Frame, pictures: Mapping[str, str]) -> dict[str, str]:
    """The text files by name; `pictures` maps names of charts to files."""
    found = verdicts(frame)
    tables = [results_table(frame), *([claims_table(found)] if found else []), costs_table(frame)]
    return {
        README: _readme(folder, frame, found, pictures),
        LATEX: "% Written by polygpt ablate.\n\n" + "\n\n".join(map(latex, tables)) + "\n",
    }


# --- the README -------------------------------------------------------------------------------------------------------


def title(file: Path) -> str:
    """The title of an ablation: the first line of its file's docstring, or the folder's name."""
    said = inspect.getdoc(load_file(file))
    return said.splitlines()[0].rstrip(".") if said else home(file).resolve().name.replace("_", " ")


def command(folder: Path) -> str:
    """The command that runs the ablation, from the parent folder of `experiments`."""
    inside = folder.resolve().parts[-3:-1] == PLACE.parts
    return f"polygpt ablate {folder.resolve().name if inside else source(folder).name}"


def _readme(folder: Path, frame: Frame, found: Sequence[Verdict], pictures: Mapping[str, str]) -> str:
    ablation = frame.ablation
    tuned = tuning(ablation, results.read(folder / results.RESULTS))
    parts = [
        WRITTEN,
        f"# {escaped_markdown(title(source(folder)))}",
        f"**Question.** {escaped_markdown(ablation.question)}",
        f"**Verdict.** {escaped_markdown(headline(frame, found))}",
        f"**Cost.** {cost(frame, tuned)}",
        f"**Command.** `{command(folder)}`",
        *(_paper(frame) if ablation.paper else []),
        *(_section("Claims", claims_table(found)) if found else []),
        *_section("Results", results_table(frame), _shown(charts(frame), pictures)),
        *_section("Cost of a run", costs_table(frame)),
        "## What was run",
        "\n".join(f"- {line}" for line in _run(frame, tuned)),
        "## Notes",
        _notes(folder),
    ]
    return "\n\n".join(parts) + "\n"


def _section(head: str, table: Table, between: Sequence[str] = ()) -> list[str]:
    text = markdown(table)
    if len(table.rows) >= LONG:
        text = f"<details><summary>{len(table.rows)} rows</summary>\n\n{text}\n\n</details>"
    return [f"## {head}", *between, text, *(escaped_markdown(note) for note in table.notes)]


def _shown(shown: Sequence[Chart], pictures: Mapping[str, str]) -> list[str]:
    lines = []
    for chart in shown:
        file = pictures.get(chart.name, f"{chart.name}.svg")
        lines.append(f"![{escaped_markdown(chart.caption).replace(']', ')').replace('[', '(')}]({file})")
    return lines


def _paper(frame: Frame) -> list[str]:
    paper = frame.ablation.paper
    arxiv = re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?", paper.reference)
    where = f"[arXiv:{paper.reference}](https://arxiv.org/abs/{paper.reference})" if arxiv else paper.reference
    parts = ["## The paper", f"*{escaped_markdown(paper.title)}*, {where}, {escaped_markdown(paper.where)}."]
    evidence = f"Evidence {paper.evidence}: results {EVIDENCE[paper.evidence]}."
    parts.append(f"{f'Setting: {escaped_markdown(paper.setting)}. ' if paper.setting else ''}{evidence}")
    if paper.figures:
        table = beside(frame)
        parts += [markdown(table), *(escaped_markdown(note) for note in table.notes)]
    return parts


def _run(frame: Frame, tuned: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    ablation, records = frame.ablation, frame.records
    over = "".join(f" × {len(values)} of {factor}" for factor, values in ablation.over.items())
    paired = "a seed gives every variant the same order of data, and runs are compared in pairs"
    yield f"{len(ablation.variants)} variants{over} × {len(frame.seeds)} seeds; {paired}."
    for factor, values in ablation.over.items():
        yield f"Run over {factor}: {', '.join(map(str, values))}."
    for factor, values in ablation.reads.items():
        yield f"Read at {factor}: {', '.join(map(str, values))}."
    if ablation.tuned:
        values = ", ".join(map(str, ablation.tuned))
        seeds = f"{ablation.tuning_seeds} seed{'s' * (ablation.tuning_seeds > 1)}"
        yield f"Every point is tuned over {values}, with {seeds} for tuning only."
    if not records:
        return
    steps = sorted({record["steps"] for record in records if not record["diverged"]})
    if steps:
        yield f"Steps: {steps[0]:,}{f' to {steps[-1]:,}' if len(steps) > 1 else ''}. {costs_table(frame).notes[0]}"
    if lacking := missing(frame):
        yield lacking
    if gone := sum(record["diverged"] for record in records):
        yield f"{gone} of {len(records)} runs diverged."
    yield f"On {_distinct(record['made']['device'] for record in records)}; {_distinct(r['how'] for r in records)}."
    made = runs_made(frame, tuned)
    versions = {name: _distinct(one[name] for one in made) for name in ("polygpt", "jax")}
    yield f"polygpt {versions['polygpt']}, {provenance.summary(made)}, JAX {versions['jax']}."
    for fault in provenance.faults(made):
        yield f"**Code.** {fault} {REMEDY}"


def runs_made(frame: Frame, tuned: Sequence[Mapping[str, Any]] = ()) -> list[Mapping[str, Any]]:
    """`made` of each run of comparison and tuning; a run shared by several points counts once."""
    return [line["made"] for line in {line["key"]: line for line in [*frame.records, *tuned]}.values()]


def _distinct(values) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def cost(frame: Frame, tuned: Sequence[Mapping[str, Any]] = ()) -> str:
    """The cost of the runs in one sentence: total wall time and FLOPs by formula."""
    lines = list({record["key"]: record for record in [*frame.records, *tuned]}.values())
    seconds, flops = (math.fsum(line[name] for line in lines) for name in ("seconds", "flops"))
    some = f" ({len(tuned)} for tuning)" if tuned else ""
    where = _distinct(line["made"]["device"] for line in lines)
    if not lines:
        return "not run yet."
    took = f"{duration(seconds)} of total wall time on {where}"
    return f"{len(lines)} runs{some}, {took}, {short(flops)} FLOPs."


def tuning(ablation: Ablation, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs of the tuning stage."""
    if not ablation.tuned:
        return []
    found = {record["key"]: record for record in records}
    made = [point for variant, at in places(ablation) for point in results.candidates(ablation, variant, at)]
    keys = [results.key(p.experiment.replace(seed=s)) for p in made for s in results.tuning_seeds(ablation)]
    return [found[key] for key in dict.fromkeys(keys) if key in found]


def _notes(folder: Path) -> str:
    """The notes in the existing README, including their markers."""
    begin, end = NOTES
    before = _read(folder / README) or ""
    if begin in before and end in before.partition(begin)[2]:
        return begin + before.partition(begin)[2].partition(end)[0] + end
    return f"{begin}\n\n{end}"


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
