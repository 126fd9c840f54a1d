"""Results: a line a run in `results.jsonl`, found again by what the run was, and the frame that is read from them.

A line: {"key", "variant", "at": {factor: value}, "tuned": value or null, "stage": "tuning" or "comparison", "seed",
"metrics": {"text/loss": ...}, "curve": {"step": [...], "loss": [...]}, "evaluations": {"step": [...], "text/loss":
[...]}, "parameters", "flops" (of all steps, by formula), "tokens" (positions of all batches, padding included),
"steps", "seconds" (this run's share), "diverged", "how", "made": {"polygpt", "commit", "jax", "device"}}. What is not
finite is null.

The key depends on the experiment with its seed, on this package's version and on the code of classes that lie outside
of it; not on what the files of data hold, nor on modules that such a class imports. A run whose key is there is never
repeated; lines whose key nobody asks for any more stay, and are not read.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polygpt import __version__, spec
from polygpt.ablation.measures import figures, lacks
from polygpt.ablation.study import Ablation, Point, places, point
from polygpt.ablation.variants import Name
from polygpt.errors import UserError
from polygpt.files import plain
from polygpt.spec import Spec
from polygpt.training.experiment import Experiment
from polygpt.training.workdir import drop_same_mathematics

RESULTS = "results.jsonl"
"""The file's name, beside the ablation's."""
TUNING = 1000
"""The first of the seeds of the tuning runs."""


# --- keys -------------------------------------------------------------------------------------------------------------


def key(experiment: Experiment) -> str:
    """What a run is known by: a SHA-256 over its configuration, this package's version and the code of other classes.

    The name is not in it, nor what changes no result (`workdir.SAME_MATHEMATICS`), nor where files of code lie. Of a
    file of code everything counts but comments, the docstring, and the functions `ablation` and `experiment`. Fields
    at their defaults are left out, so that results outlive a field that is added: at its default it does what was done
    without it. Whoever changes a default therefore changes the version.
    """
    return _key(_configured(experiment), experiment.seed)


def _key(configured: str, seed: int) -> str:
    return hashlib.sha256(f"{configured}/{seed}".encode()).hexdigest()


def _configured(experiment: Experiment) -> str:
    sources: dict[str, str] = {}
    data = _given(experiment.replace(seed=0, name="any"))
    drop_same_mathematics(data)
    _of_classes(experiment, sources)
    return json.dumps([data, __version__, sorted(sources.items())], sort_keys=True)


def _given(value: Any) -> Any:
    """JSON data as of `spec.to_json`, of fields that are not at their defaults; a file's class without the folder."""
    if isinstance(value, Spec):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not _is_default(value, f)}
        name = spec.class_name(type(value)).rpartition(os.sep)[2]
        return {"class": name, **{name: _given(item) for name, item in fields.items()}}
    if isinstance(value, Mapping):
        return {name: _given(item) for name, item in value.items()}
    return [_given(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_default(value: Spec, field: dataclasses.Field) -> bool:
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return made is not dataclasses.MISSING and getattr(value, field.name) == made


def _of_classes(value: Any, sources: dict[str, str]) -> None:
    """Adds the code of all classes of specifications inside `value` that are not the package's own."""
    if isinstance(value, Spec):
        for cls in type(value).__mro__:
            outside = cls.__module__.partition(".")[0] != "polygpt" and issubclass(cls, Spec)
            file = getattr(sys.modules.get(cls.__module__), "__file__", None) if outside else None
            if file:
                sources[f"{Path(file).name}:{cls.__qualname__}"] = _code(Path(file), os.stat(file).st_mtime_ns)
        for field in dataclasses.fields(value):
            _of_classes(getattr(value, field.name), sources)
    elif isinstance(value, Mapping):
        _of_classes(tuple(value.values()), sources)
    elif isinstance(value, tuple):
        for item in value:
            _of_classes(item, sources)


@functools.lru_cache(256)
def _code(file: Path, changed: int) -> str:
    tree = ast.parse(file.read_bytes())
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    asking = (ast.FunctionDef,)
    kept = [part for part in body if not (isinstance(part, asking) and part.name in ("ablation", "experiment"))]
    return hashlib.sha256("\n".join(map(ast.dump, kept)).encode()).hexdigest()


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, [] if there is none; the last is dropped if it is not whole.

    Raises:
        UserError: if another line is no JSON.
    """
    records, lines = [], path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(
                    f"{path}, line {number} is not JSON: remove that line, and its run is made anew"
                ) from None
    return records


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines; when this returns they are on the disk. What a killed process left of a line is removed."""
    text = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records)
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
    configured = [point and _configured(point.experiment) for point in chosen]
    if seeds is None:
        there = {record["seed"] for record in found.values() if record["seed"] < TUNING}
        seeds = [seed for seed in sorted(there) if any(c and _key(c, seed) in found for c in configured)]
        seeds = seeds or range(ablation.seeds)
    axes = ablation.axes()
    shape = (len(seeds), *map(len, axes.values()))
    values = {variant: np.full(shape, np.nan) for variant in ablation.variants}
    asked = []
    reads = next(iter(ablation.reads.values()), None)
    for made, text in zip(chosen, configured, strict=True):
        for s, seed in enumerate(seeds if made else ()):
            record = found.get(_key(text, seed))
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
    return {"key": record.get("key"), **said, **{name: v for name, v in record.items() if name not in ("key", *said)}}


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
