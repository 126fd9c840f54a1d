"""An ablation: a question as a specification, and the runs that answer it.

A *variant* is a named set of changes to the base experiment. A *factor* is something that every variant is run over, or
that is read from one run at several values. A *point* is a variant at one value of each factor that it is run over; a
*run* is a point with one seed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from polygpt.ablation.budget import Budget
from polygpt.ablation.claims import Claim, check
from polygpt.ablation.measures import measure
from polygpt.ablation.variants import Changes, Name, united
from polygpt.errors import SpecError, UserError
from polygpt.evaluation.metric import Measure
from polygpt.overrides import replaced
from polygpt.spec import Spec, faults_of, load_file, nearest
from polygpt.training.experiment import Experiment

PLACE = Path("experiments") / "ablations"
"""Folder of named ablations. Each has a subfolder with this file:"""
FILE = "experiment.py"


@dataclasses.dataclass(frozen=True)
class Paper(Spec):
    """The paper to reproduce, with its results."""

    title: str
    """Title of the paper."""
    reference: str
    """Where to find it: "2002.05202" for arXiv."""
    where: str
    """Location in the paper: "Table 1"."""
    evidence: Literal["V", "A", "M"]
    """Source of its figures. V: verified in the paper. A: abstract or a summary. M: memory, not yet checked."""
    unit: str = ""
    """Unit of its results."""
    setting: str = ""
    """Model and data they were measured on."""
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Its results by variant."""
    better: Literal["lower", "higher"] | None = None
    """Which values of its results are better: higher for accuracies, even if the ablation measures losses. null: the
    same as in the ablation."""


@dataclasses.dataclass(frozen=True)
class Ablation(Spec):
    """A question about variants of an experiment, with everything needed to answer it."""

    question: str
    """The question, one sentence."""
    base: Experiment
    """The experiment that variants change. Its seed and name are not used."""
    variants: Mapping[str, Changes]
    """Changes by variant: new values of dotted fields, `{"model.decoder.width": 64}`; {} is the base itself."""
    paper: Paper | None = None
    """The paper to reproduce."""
    metric: str = "text/loss"
    """What is compared: "task/measure" of a held-out task; "train/loss", the mean of the last tenth of the training
    losses; or a cost: "cost/parameters", "cost/flops" of the whole run, "cost/seconds", "cost/cache_bytes" per row of
    the decoding cache, "cost/decode_seconds" per token."""
    better: Literal["lower", "higher"] | None = None
    """Which values of the metric are better; null: as the metric declares."""
    unit: str | None = None
    """Unit of the metric; null: as the metric declares."""
    seeds: int = 5
    """Runs per point, with seeds 0, 1, 2, ..."""
    over: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Factors that every variant is run over: changes by value (a number or a text), by factor."""
    reads: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """At most one factor that is read from every run: the metric by value, `{"length": {128: "at_128/loss"}}`."""
    tuned: Any = dataclasses.field(default_factory=dict)
    """A grid, changes by value: every point is first run at each value, with seeds 1000, 1001, ..., and compared at its
    best value by `metric`, even with a factor in `reads`."""
    tuning_seeds: int = 1
    """Runs per point and value of the grid."""
    budget: Budget = Budget()
    """What is equal between variants."""
    claims: tuple[Claim, ...] = ()
    """Claims to test with the results."""
    noise: float | None = None
    """The smallest difference that counts, in the metric's unit; null for the pooled standard deviation over seeds.
    With the default, five seeds cannot show that variants are equal (ablation/claims.py): set a number if a claim needs
    it."""
    diverged: float | None = None
    """Metric to assign to runs that diverged or did worse than this; null: such a run is an error."""

    def validate(self):
        self.require(bool(self.variants) and all(self.variants), "variants", "at least one, each with a name")
        self.require(self.seeds >= 1, "seeds", "at least 1")
        self.require(self.tuning_seeds >= 1, "tuning_seeds", "at least 1")
        self.require(len(self.reads) <= 1, "reads", "at most one factor")
        self.require(not self.over.keys() & self.reads.keys(), "reads", "a factor that is not also in `over`")
        self.require(self.noise is None or self.noise >= 0, "noise", "null or at least 0")
        for factor, values in self.over.items():
            _check_values(f"over[{factor!r}]", values, Mapping, "changes: {dotted field: value}")
            self.require(bool(values), "over", "factors with at least one value each")
        for factor, values in self.reads.items():
            _check_values(f"reads[{factor!r}]", values, str, "a metric, 'task/measure'")
            self.require(bool(values), "reads", "a factor with at least one value")
        _check_values("tuned", self.tuned, Mapping, "changes: {dotted field: value}")
        check(self.claims, self.variants, self.axes())

    def metrics(self) -> list[str]:
        """All metrics read from runs, the main one first."""
        return [self.metric, *(metric for values in self.reads.values() for metric in values.values())]

    @functools.cached_property
    def measure(self) -> Measure:
        """The main metric, with `better` and `unit` filled in. Raises like `point`."""
        own = measure(point(self, *next(places(self))).experiment, self.metric)
        better = self.better or own.better
        if better is None:
            raise SpecError(
                f"Ablation.better is null, and {self.metric} does not declare a direction: set it to 'lower' or "
                "'higher', or list it in `measures` of its metric"
            )
        return dataclasses.replace(own, better=better, unit=own.unit if self.unit is None else self.unit)

    @property
    def heading(self) -> str:
        """The label with the unit: "text/loss (nats per byte)"."""
        return f"{self.label} ({self.measure.unit})" if self.measure.unit else self.label

    @property
    def label(self) -> str:
        """The metric's name in tables: "loss" if read from several tasks."""
        return self.metric.rpartition("/")[2] if self.reads else self.metric

    def axes(self) -> dict[str, tuple[Name, ...]]:
        """The values of every factor: first those in `over`, then the one in `reads`."""
        return {factor: tuple(values) for factor, values in {**self.over, **self.reads}.items()}


@dataclasses.dataclass(frozen=True)
class Point:
    """A variant at one value of each factor that it is run over.

    Attributes:
        variant: its name.
        at: the value of each factor.
        experiment: what is run, with any seed.
        tuned: its value of the tuned grid, if there is one.
    """

    variant: str
    at: dict[str, Name]
    experiment: Experiment
    tuned: Name | None = None

    @property
    def name(self) -> str:
        """A readable name: "geglu, width 64, tuned 0.001"."""
        values = {**self.at, **({} if self.tuned is None else {"tuned": self.tuned})}
        return ", ".join([self.variant, *(f"{factor} {value}" for factor, value in values.items())])


def places(ablation: Ablation) -> Iterator[tuple[str, dict[str, Name]]]:
    """Every variant with every combination of values of the factors in `over`."""
    for variant in ablation.variants:
        for values in itertools.product(*ablation.over.values()):
            yield variant, dict(zip(ablation.over, values, strict=True))


def point(ablation: Ablation, variant: str, at: Mapping[str, Name], tuned: Name | None = None) -> Point:
    """One point.

    Raises:
        SpecError: names the point if changes do not fit the base or each other, or the budget cannot be met.
    """
    around = {f"{factor} {value}": ablation.over[factor][value] for factor, value in at.items()}
    around |= {} if tuned is None else {f"tuned {tuned}": ablation.tuned[tuned]}
    own = {f"variant {variant!r}": ablation.variants[variant]}
    made = Point(variant, dict(at), ablation.base, tuned)
    try:
        changes = united({**own, **around})
        if ablation.budget.by in ("tokens", "flops") and "train.steps" in ablation.variants[variant]:
            raise SpecError(f"it changes train.steps, which the budget by {ablation.budget.by} sets")
        experiment = replaced(ablation.base, changes)
        if ablation.budget != Budget():
            experiment = ablation.budget.applied(experiment, replaced(ablation.base, united(around)))
        for metric in ablation.metrics():
            measure(experiment, metric)
    except SpecError as error:
        raise SpecError(f"{made.name}: {error}") from None
    return dataclasses.replace(made, experiment=experiment)


def points(ablation: Ablation) -> list[Point]:
    """All points, variant by variant, without the tuned grid. Raises like `point`."""
    return [point(ablation, variant, at) for variant, at in places(ablation)]


def find_ablation(name: str | Path) -> Path:
    """The file of an ablation, given its name, its folder or its file.

    Raises:
        UserError: there is none; suggests the closest names.
    """
    path = Path(name)
    if path.suffix == ".py":
        return path
    folders = [PLACE / str(name).replace("-", "_"), path]
    found = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if found is None:
        there = [file.parent.name for file in sorted(PLACE.glob(f"*/{FILE}"))]
        raise UserError(f"no ablation {str(name)!r} in {PLACE}: {nearest(str(name), there)}")
    return found


def load_ablation(name: str | Path) -> Ablation:
    """Calls `ablation()` of a file; for `name` see `find_ablation`.

    Raises:
        UserError: there is no such file, or it does not return an Ablation.
    """
    file = find_ablation(name)
    make = getattr(load_file(file), "ablation", None)
    if not callable(make):
        raise UserError(f"{file}: no function ablation(): write `def ablation() -> Ablation:` in it")
    with faults_of(file):
        made = make()
    if not isinstance(made, Ablation):
        raise UserError(f"{file}: ablation() returns {type(made).__name__}: it must return an Ablation")
    return made


def _check_values(where: str, values: Any, kind: type, what: str) -> None:
    if not isinstance(values, Mapping):
        raise SpecError(f"Ablation.{where} is {values!r}: it must be a mapping from values to {what}")
    for value, item in values.items():
        if isinstance(value, bool) or not isinstance(value, Name):
            raise SpecError(f"Ablation.{where}: the value {value!r} must be a number or a string")
        if not isinstance(item, kind):
            raise SpecError(f"Ablation.{where}[{value!r}] is {item!r}: it must be {what}")
