"""The report of a search: tables, plots, and all data as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polygpt.ablation.tuning import pictures
from polygpt.ablation.tuning.summary import Summary, objectives
from polygpt.files import write_atomically
from polygpt.report.charts import figure

REPORT, SUMMARY = "report.md", "summary.json"
LONGEST = 100
"""Maximum number of rows in the table of trials."""
ROUGH = 30
"""Number of complete trials below which importances have a caveat."""
CAVEAT = "Importances from {} trials are rough: further trials may well change their order."


def write(summary: Summary, folder: Path) -> Path:
    """Writes the report, plots and all data as JSON; returns the path of the report."""
    drawn = pictures.draw(summary, folder)
    write_atomically(folder / SUMMARY, json.dumps(summary.to_json(), indent=1, allow_nan=False) + "\n")
    write_atomically(folder / REPORT, markdown(summary, drawn))
    return folder / REPORT


def tables(summary: Summary) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows): the best trials, and the importance of dimensions."""
    dimensions = list(summary.search.dimensions)
    columns = ["trial", *objectives(summary.search), *dimensions]
    rows = [[str(trial["number"]), *_figures(trial, dimensions)] for trial in map(summary.trial, summary.best)]
    title = "best" if summary.search.against is None else "Pareto front"
    made = [(title, columns, rows)] if rows else []
    if summary.importance:
        order = sorted(dimensions, key=lambda name: -next(iter(summary.importance.values())).get(name, 0.0))
        rows = [[name, *(f"{shares.get(name, 0.0):.2f}" for shares in summary.importance.values())] for name in order]
        made.append(("importance: share of the variation between trials", ["dimension", *summary.importance], rows))
    return made


def markdown(summary: Summary, drawn: Sequence[str]) -> str:
    """The report."""
    search, trials = summary.search, summary.trials
    complete = sum(trial["reason"] is None for trial in trials)
    how = f"{search.sampler}, seed {search.seed}" + (f", pruning by {search.pruning}" if search.pruning else "")
    parts = [
        f"# {search.base.name}: {' against '.join(objectives(search))}, {search.direction} is better",
        f"{len(trials)} of {search.trials} trials are done, {complete} of them complete ({how}).",
    ]
    if summary.failed:
        said = "; ".join(f"{one['number']}: {one['reason']}" for one in summary.failed)
        parts.append(f"{len(summary.failed)} trials failed and do not count, possibly because of the machine ({said}).")
    if summary.importance and complete < ROUGH:
        parts.append(CAVEAT.format(complete))
    for title, columns, rows in tables(summary):
        parts += [f"## {title[0].upper()}{title[1:]}", _table(columns, rows)]
    if len(summary.best) == 1 and (words := summary.command(summary.trial(summary.best[0]))) is not None:
        parts += ["To train with these values:", f"```\npolygpt train FILE {' '.join(words)}\n```"]
    parts += [f"![{name.rpartition('.')[0]}]({name})" for name in drawn]
    dimensions = list(search.dimensions)
    rows = [[str(trial["number"]), *_figures(trial, dimensions), trial["reason"] or ""] for trial in trials[-LONGEST:]]
    parts += ["## Trials", _table(["trial", *objectives(search), *dimensions, ""], rows)]
    return "\n\n".join(parts) + "\n"


def _figures(trial: Mapping[str, Any], dimensions: Sequence[str]) -> list[str]:
    """The objectives and values of a trial, formatted for a table."""
    values = list((trial["objectives"] or {"": None}).values())
    shown = ["–" if value is None else figure(value) for value in values]
    return shown + [figure(v) if isinstance(v := trial["values"][name], float) else str(v) for name in dimensions]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
