"""An ablation: the whole question as one specification, and the runs that it asks for.

A *variant* is a named set of changes to the base experiment. A *factor* is something that every variant is run over, or
read at from one run. A *point* is a variant at one value of each factor that it is run over; a *run* is a point with
one seed.
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
"""Where the ablations lie that are called by their names: a folder each, with this file in it:"""
FILE = "experiment.py"


@dataclasses.dataclass(frozen=True)
class Paper(Spec):
    """Where a question, and the answer that is to be repeated, come from."""

    title: str
    """Of the paper."""
    reference: str
    """By which it is found: "2002.05202" on arXiv."""
    where: str
    """The place in it: "Table 1"."""
    evidence: Literal["V", "A", "M"]
    """How its figures were come by: V verified in the paper, A from its abstract or a summary, M from memory, to be
    checked."""
    unit: str = ""
    """Of its figures."""
    setting: str = ""
    """What they were measured on."""
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Its results by variant."""
    better: Literal["lower", "higher"] | None = None
    """Which of its figures are the better ones: of accuracies higher, though we may measure losses; null for as in the
    ablation."""


@dataclasses.dataclass(frozen=True)
class Ablation(Spec):
    """A question about variants of an experiment, with all that is needed to answer it."""

    question: str
    """The question, one sentence."""
    base: Experiment
    """The experiment that variants are changes of. Its seed and its name are not used."""
    variants: Mapping[str, Changes]
    """By name, the changes: new values of dotted fields, `{"model.decoder.width": 64}`; {} is the base itself."""
    paper: Paper | None = None
    """What is to be repeated."""
    metric: str = "text/loss"
    """What is compared: "task/measure" of a held-out task; "train/loss", the mean of the last tenth of the training
    losses; or a cost: "cost/parameters", "cost/flops" of the whole run, "cost/seconds", "cost/cache_bytes" per row of
    the decoding cache, "cost/decode_seconds" per token."""
    better: Literal["lower", "higher"] | None = None
    """Which values of the metric are better; null for what the metric itself declares."""
    unit: str | None = None
    """Unit of the metric; null for what the metric itself declares."""
    seeds: int = 5
    """Runs a point, with the seeds from 0 on."""
    over: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Factors that every variant is run over: by factor, by value (a number or a text), the changes that make it."""
    reads: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """At most one factor that every run is read at: by value, the metric: `{"length": {128: "at_128/loss"}}`."""
    tuned: Any = dataclasses.field(default_factory=dict)
    """A grid, by value the changes: every point is first run at each, with seeds from 1000 on, and its best value by
    the metric is taken for the comparison. With a factor in `reads`, too, it is `metric` that chooses."""
    tuning_seeds: int = 1
    """Runs for each of them."""
    budget: Budget = Budget()
    """What is held equal between variants."""
    claims: tuple[Claim, ...] = ()
    """What is to be judged by the results."""
    noise: float | None = None
    """The smallest difference that counts, in the metric's unit; null for the pooled standard deviation over seeds, to
    within which five seeds cannot show that variants are equal (`claims.py`): give a number where a claim says so."""
    diverged: float | None = None
    """What counts as the metric of a run that diverged, or that is worse than this; null: such a run is an error."""

    def validate(self):
        self.require(bool(self.variants) and all(self.variants), "variants", "at least one, each with a name")
        self.require(self.seeds >= 1, "seeds", "at least 1")
        self.require(self.tuning_seeds >= 1, "tuning_seeds", "at least 1")
        self.require(len(self.reads) <= 1, "reads", "at most one factor")
        self.require(not self.over.keys() & self.reads.keys(), "reads", "a factor that is not in `over` too")
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
        """All metrics that are read from runs, the main one first."""
        return [self.metric, *(metric for values in self.reads.values() for metric in values.values())]

    @functools.cached_property
    def measure(self) -> Measure:
        """What the main metric is, with `better` and `unit` filled in. Errors as `point`."""
        own = measure(point(self, *next(places(self))).experiment, self.metric)
        better = self.better or own.better
        if better is None:
            raise SpecError(
                f"Ablation.better is null, and {self.metric} does not declare a direction: set it to 'lower' or "
                "'higher', or list the figure in `measures` of its metric"
            )
        return dataclasses.replace(own, better=better, unit=own.unit if self.unit is None else self.unit)

    @property
    def heading(self) -> str:
        """The label with the unit: "text/loss (nats per byte)"."""
        return f"{self.label} ({self.measure.unit})" if self.measure.unit else self.label

    @property
    def label(self) -> str:
        """The metric's name where values of it stand: "loss", if they are read of several tasks."""
        return self.metric.rpartition("/")[2] if self.reads else self.metric

    def axes(self) -> dict[str, tuple[Name, ...]]:
        """The values of every factor: of those that are run over, then of that which is read at."""
        return {factor: tuple(values) for factor, values in {**self.over, **self.reads}.items()}


@dataclasses.dataclass(frozen=True)
class Point:
    """A variant at one value of each factor that it is run over.

    Attributes:
        variant: its name.
        at: the value of each factor.
        experiment: what is run, with whatever seed.
        tuned: the value of the tuned grid that it is run with, if there is one.
    """

    variant: str
    at: dict[str, Name]
    experiment: Experiment
    tuned: Name | None = None

    @property
    def name(self) -> str:
        """For people: "geglu, width 64, tuned 0.001"."""
        values = {**self.at, **({} if self.tuned is None else {"tuned": self.tuned})}
        return ", ".join([self.variant, *(f"{factor} {value}" for factor, value in values.items())])


def places(ablation: Ablation) -> Iterator[tuple[str, dict[str, Name]]]:
    """Every variant with every combination of the values of the factors that it is run over."""
    for variant in ablation.variants:
        for values in itertools.product(*ablation.over.values()):
            yield variant, dict(zip(ablation.over, values, strict=True))


def point(ablation: Ablation, variant: str, at: Mapping[str, Name], tuned: Name | None = None) -> Point:
    """One point.

    Raises:
        SpecError: that names the point, if changes do not fit the base, or each other, or no budget comes out even.
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
    """All points, variant by variant. Where there is a tuned grid, it is not applied. Errors as `point`."""
    return [point(ablation, variant, at) for variant, at in places(ablation)]


def find_ablation(name: str | Path) -> Path:
    """The file of an ablation, given its name, its folder or the file.

    Raises:
        UserError: if there is none, with the nearest names.
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
    """The ablation that the `ablation()` of a file makes; for `name` see `find_ablation`.

    Raises:
        UserError: if there is no such file, or it makes no ablation.
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
            raise SpecError(f"Ablation.{where}: the value {value!r} must be a number or a text")
        if not isinstance(item, kind):
            raise SpecError(f"Ablation.{where}[{value!r}] is {item!r}: it must be {what}")
