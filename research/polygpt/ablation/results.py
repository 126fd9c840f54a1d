"""Results: one line per run in `results.jsonl`, identified by the run's key, and the frame read from them.

A line: {"schema", "key", "variant", "at": {factor: value}, "tuned": value or null, "stage": "tuning" or "comparison",
"seed", "metrics": {"text/loss": ...}, "curve": {"step": [...], "loss": [...]}, "evaluations": {"step": [...],
"text/loss": [...]}, "parameters", "flops" (of all steps, by formula), "tokens" (positions of all batches, padding
included), "steps", "seconds" (this run's share), "diverged", "how", "made": {"polygpt", "commit", "jax", "device",
"code": see `provenance.py`, null if unknown}}. Non-finite values are null.

A run whose key (`keys.py`) exists is never repeated. Lines with obsolete keys stay in the file and are ignored.
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
"""Name of the results file, next to the ablation's file."""
TUNING = 1000
"""First seed of tuning runs."""
SCHEMA = 2
"""Schema of new lines."""


def _with_code(line: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 did not record the code of a run."""
    return {**line, "made": {**line["made"], "code": None}} if "made" in line else line


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _with_code}
"""Migrations to the next schema, by schema. A line without a number has schema 1."""


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, migrated to SCHEMA; [] without a file. Drops an incomplete last line.

    Raises:
        UserError: another line is not JSON, or a line has a newer schema.
    """
    records, lines = [], path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(migrated(json.loads(line), f"{path}, line {number}"))
        except ValueError:
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(f"{path}, line {number} is not JSON: remove that line to repeat its run") from None
    return records


def migrated(line: dict[str, Any], place: str) -> dict[str, Any]:
    """A line migrated to SCHEMA. Raises UserError, naming the place, if its schema is newer."""
    schema = line.get("schema", 1)
    if schema > SCHEMA:
        raise UserError(f"{place} has schema {schema}, but this version supports {SCHEMA}: update polygpt")
    for number in range(schema, SCHEMA):
        line = MIGRATIONS[number](line)
    return {**line, "schema": SCHEMA}


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines durably. Removes a partial line left by a killed process."""
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
    """The results of a comparison, for claims, tables and plots.

    Attributes:
        ablation: the ablation.
        seeds: the S seeds.
        axes: the values of every factor: those in `over`, then the one in `reads`.
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
    """The results for the current definition of an ablation.

    Args:
        ablation: the ablation.
        records: lines of results; obsolete ones are ignored.
        seeds: seeds to use; default: all seeds that any run of the comparison has.

    Raises:
        UserError: a run diverged and `Ablation.diverged` is not set, or a run lacks the metric.
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
    """Lines of results by key, without those that lack a requested cost; their runs are repeated."""
    return {record["key"]: record for record in records if not lacks(record, ablation.metrics())}


def labelled(record: Mapping[str, Any], made: Point, stage: str) -> dict[str, Any]:
    """A run's line with the labels of the given point."""
    said = {"variant": made.variant, "at": made.at, "tuned": made.tuned, "stage": stage}
    first = {"schema": SCHEMA, "key": record.get("key"), **said}
    return {**first, **{name: value for name, value in record.items() if name not in first}}


def candidates(ablation: Ablation, variant: str, at: Mapping[str, Name]) -> list[Point]:
    """The point at every value of the tuned grid."""
    return [point(ablation, variant, at, value) for value in ablation.tuned]


def tuning_seeds(ablation: Ablation) -> range:
    """Seeds of the tuning runs."""
    return range(TUNING, TUNING + ablation.tuning_seeds)


def choose(
    ablation: Ablation, variant: str, at: Mapping[str, Name], found: Mapping[str, Mapping[str, Any]]
) -> Point | None:
    """A point at its best value of the tuned grid, by mean metric; the first in a tie.

    A value that diverged for any seed is worse than all others, unless `Ablation.diverged` is set.

    Args:
        ablation, variant, at: the point.
        found: lines of results by key.

    Returns:
        The point; None while tuning results are missing.

    Raises:
        UserError: it diverged at every value.
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
            "add values, or set Ablation.diverged to the metric to assign"
        )
    return best[1]


def _listed(values: Iterable[Name]) -> str:
    return ", ".join(map(str, values))


def _figure(ablation: Ablation, record: Mapping[str, Any], metric: str) -> float:
    """A metric of a run in the comparison."""
    value = _bounded(ablation, record, metric)
    if not math.isfinite(value):
        at = "".join(f", {factor} {value}" for factor, value in record["at"].items())
        raise UserError(
            f"{record['variant']}{at}, seed {record['seed']}: training diverged: lower its learning rate, or set "
            "Ablation.diverged to the metric to assign"
        )
    return value


def _bounded(ablation: Ablation, record: Mapping[str, Any], metric: str) -> float:
    """A metric of a run; if it diverged or is worse, `Ablation.diverged` or infinity."""
    lower, measured = ablation.measure.better == "lower", figures(record)
    value = None if record["diverged"] else measured.get(metric)
    if value is None:
        if not record["diverged"] and metric not in measured:
            raise UserError(f"{record['variant']}: {metric!r} was not measured; there are {_listed(sorted(measured))}")
        value = math.inf if lower else -math.inf
    if ablation.diverged is None:
        return value
    return min(value, ablation.diverged) if lower else max(value, ablation.diverged)
