"""Results: a line per run in `results.jsonl`, found again by the key of the run, and the frame read from them.

A line: {"schema", "key", "variant", "at": {factor: value}, "tuned": value or null, "stage": "tuning" or "comparison",
"seed", "metrics": {"text/loss": ...}, "curve": {"step": [...], "loss": [...]}, "evaluations": {"step": [...],
"text/loss": [...]}, "parameters", "flops" (of all steps, by formula), "tokens" (positions of all batches, padding
included), "steps", "seconds" (this run's share), "diverged", "how", "made": {"polygpt", "commit", "jax", "device",
"code": see `provenance.py`, null if unknown}}. What is not finite is null.

A run whose key (`keys.py`) is there is never repeated. Lines whose key nobody asks for any more stay and are not read.
"""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.ablation.keys import configured, key, key_of
from polygpt.ablation.measures import figures, lacks
from polygpt.ablation.study import Ablation, Point, places, point
from polygpt.ablation.variants import Name
from polygpt.errors import UserError
from polygpt.files import plain

RESULTS = "results.jsonl"
"""The file's name, beside the ablation's."""
TUNING = 1000
"""The first seed of the tuning runs."""
SCHEMA = 2
"""Of the lines that are written now."""


def _with_code(line: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 did not say of which code a run is."""
    return {**line, "made": {**line["made"], "code": None}} if "made" in line else line


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _with_code}
"""By the schema of a line what makes it one of the next schema. A line without a number is of schema 1."""


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results as of SCHEMA; [] without a file. An incomplete last line is dropped.

    Raises:
        UserError: another line is not JSON, or a line is of a later schema.
    """
    records, lines = [], path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(migrated(json.loads(line), f"{path}, line {number}"))
        except ValueError:
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(
                    f"{path}, line {number} is not JSON: remove that line, and its run is made again"
                ) from None
    return records


def migrated(line: dict[str, Any], place: str) -> dict[str, Any]:
    """A line as of SCHEMA. Raises UserError, naming the place, if it is of a later one."""
    schema = line.get("schema", 1)
    if schema > SCHEMA:
        raise UserError(f"{place} is of schema {schema}, and this version knows {SCHEMA}: update polygpt")
    for number in range(schema, SCHEMA):
        line = MIGRATIONS[number](line)
    return {**line, "schema": SCHEMA}


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines; when this returns they are on the disk. What a killed process left of a line is removed."""
    text = "".join(json.dumps({"schema": SCHEMA, **plain(record)}, allow_nan=False) + "\n" for record in records)
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read()
        if whole and not whole.endswith(b"\n"):
            try:
                json.loads(whole[whole.rfind(b"\n") + 1 :])
                text = "\n" + text
            except ValueError:
                file.truncate(whole.rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


# --- the frame --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """The results of a comparison, as claims, tables and pictures read them.

    Attributes:
        ablation: the question.
        seeds: S of them.
        axes: the values of every factor: those that are run over, then the one that is read at.
        values: by variant, the metric, float64 [S, values of the first factor, of the second, ...]; NaN where a run is
            missing.
        records: the lines of these runs, under the variant and point that asked for them.
    """

    ablation: Ablation
    seeds: tuple[int, ...]
    axes: dict[str, tuple[Name, ...]]
    values: dict[str, np.ndarray]
    records: list[dict[str, Any]]


def frame(ablation: Ablation, records: Iterable[Mapping[str, Any]], seeds: Sequence[int] | None = None) -> Frame:
    """What the results say of an ablation as it is now.

    Args:
        ablation: the ablation.
        records: lines of results, among them those of runs that nobody asks for any more.
        seeds: which; by default all that some run of the comparison is there for.

    Raises:
        UserError: for a run that diverged, if the ablation does not say what counts as its metric, or that does not
            have the metric.
    """
    found = by_key(ablation, records)
    chosen = [choose(ablation, variant, at, found) for variant, at in places(ablation)]
    texts = [point and configured(point.experiment) for point in chosen]
    if seeds is None:
        there = {record["seed"] for record in found.values() if record["seed"] < TUNING}
        seeds = [seed for seed in sorted(there) if any(c and key_of(c, seed) in found for c in texts)]
        seeds = seeds or range(ablation.seeds)
    axes = ablation.axes()
    shape = (len(seeds), *map(len, axes.values()))
    values = {variant: np.full(shape, np.nan) for variant in ablation.variants}
    asked = []
    reads = next(iter(ablation.reads.values()), None)
    for made, text in zip(chosen, texts, strict=True):
        for s, seed in enumerate(seeds if made else ()):
            record = found.get(key_of(text, seed))
            if record is None:
                continue
            asked.append(labelled(record, made, "comparison"))
            place = (s, *(axes[factor].index(value) for factor, value in made.at.items()))
            metrics = [ablation.metric] if reads is None else list(reads.values())
            found_here = [_figure(ablation, asked[-1], metric) for metric in metrics]
            values[made.variant][place] = found_here[0] if reads is None else found_here
    return Frame(ablation, tuple(seeds), axes, values, asked)


def by_key(ablation: Ablation, records: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Lines of results by key. Those that lack a cost that the ablation asks for are left out, and are run again."""
    return {record["key"]: record for record in records if not lacks(record, ablation.metrics())}


def labelled(record: Mapping[str, Any], made: Point, stage: str) -> dict[str, Any]:
    """A run's line, under the point that asks for it."""
    said = {"variant": made.variant, "at": made.at, "tuned": made.tuned, "stage": stage}
    first = {"schema": SCHEMA, "key": record.get("key"), **said}
    return {**first, **{name: value for name, value in record.items() if name not in first}}


def candidates(ablation: Ablation, variant: str, at: Mapping[str, Name]) -> list[Point]:
    """A point at every value of the tuned grid."""
    return [point(ablation, variant, at, value) for value in ablation.tuned]


def tuning_seeds(ablation: Ablation) -> range:
    """Of the runs that the tuned grid's values are compared by."""
    return range(TUNING, TUNING + ablation.tuning_seeds)


def choose(
    ablation: Ablation, variant: str, at: Mapping[str, Name], found: Mapping[str, Mapping[str, Any]]
) -> Point | None:
    """A point as it is compared: at its best value of the tuned grid, by mean metric, the first of equals.

    A value that diverged with any seed is worse than all that did not, unless the ablation says what it counts as.

    Args:
        ablation, variant, at: the point.
        found: lines of results by key.

    Returns:
        The point; None while results of tuning are missing.

    Raises:
        UserError: if it diverged at every value.
    """
    if not ablation.tuned:
        return point(ablation, variant, at)
    means = []
    for made in candidates(ablation, variant, at):
        lines = [found.get(key(made.experiment.replace(seed=seed))) for seed in tuning_seeds(ablation)]
        if None in lines:
            return None
        mean = statistics.fmean(_bounded(ablation, labelled(line, made, "tuning"), ablation.metric) for line in lines)
        means.append((mean if ablation.measure.better == "lower" else -mean, made))
    best = min(means, key=lambda pair: pair[0])
    if not math.isfinite(best[0]):
        raise UserError(
            f"{best[1].variant}: training diverged at every value of the tuned grid ({_listed(ablation.tuned)}): "
            "add values, or set Ablation.diverged to what counts as its metric"
        )
    return best[1]


def _listed(values: Iterable[Name]) -> str:
    return ", ".join(map(str, values))


def _figure(ablation: Ablation, record: Mapping[str, Any], metric: str) -> float:
    """A metric of a run of the comparison."""
    value = _bounded(ablation, record, metric)
    if not math.isfinite(value):
        at = "".join(f", {factor} {value}" for factor, value in record["at"].items())
        raise UserError(
            f"{record['variant']}{at}, seed {record['seed']}: training diverged: lower its learning rate, or set "
            "Ablation.diverged to what counts as its metric"
        )
    return value


def _bounded(ablation: Ablation, record: Mapping[str, Any], metric: str) -> float:
    """A metric of a run; of one that diverged, or is worse, what the ablation says that counts, or the infinite."""
    lower, measured = ablation.measure.better == "lower", figures(record)
    value = None if record["diverged"] else measured.get(metric)
    if value is None:
        if not record["diverged"] and metric not in measured:
            raise UserError(f"{record['variant']}: {metric!r} was not measured: there are {_listed(sorted(measured))}")
        value = math.inf if lower else -math.inf
    if ablation.diverged is None:
        return value
    return min(value, ablation.diverged) if lower else max(value, ablation.diverged)
