"""A hyperparameter search: the search space and the objective.

    def search() -> Search:
        return Search(
            experiment(),
            {
                "optim.schedule.peak_lr": Float(1e-4, 1e-2, log=True),
                "model.decoder.depth": Int(2, 6),
                "mlp": Choice({"gelu": {}, "swiglu": {"model.decoder.mlp": GatedMLP("silu")}}),
            },
            trials=40,
            pruning="median",
        )

`tuning/` runs it.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polygpt import overrides
from polygpt.ablation.budget import Budget
from polygpt.ablation.measures import MEASURES, TRAINING_LOSS, measure
from polygpt.ablation.variants import Changes, united
from polygpt.errors import SpecError, UserError
from polygpt.evaluation.metric import Measure
from polygpt.overrides import leaves, replaced
from polygpt.spec import Spec, conform, faults_of, load_file, nearest
from polygpt.training.experiment import Experiment

EVALUATIONS = 10
"""Evaluations of a run that can be pruned, unless the experiment sets `evaluate_every`."""


@dataclasses.dataclass(frozen=True)
class Dimension(Spec):
    """Base class of search dimensions. The name of a dimension is the dotted field that it sets."""

    def changes(self, name: str, value: Any) -> Changes:
        """The changes that a chosen value makes."""
        return {name: value}


@dataclasses.dataclass(frozen=True)
class Float(Dimension):
    """A number in a closed interval."""

    low: float
    """Minimum."""
    high: float
    """Maximum."""
    log: bool = False
    """Whether to search on a logarithmic scale: for learning rates, weight decay."""

    def validate(self):
        self.require(math.isfinite(self.low) and self.low < self.high < math.inf, "high", f"more than {self.low}")
        self.require(not self.log or self.low > 0, "low", "positive where log is true")


@dataclasses.dataclass(frozen=True)
class Int(Dimension):
    """An integer in a closed interval."""

    low: int
    """Minimum."""
    high: int
    """Maximum."""
    step: int = 1
    """Distance between candidates, counted from `low`."""
    log: bool = False
    """Whether to search on a logarithmic scale: for widths."""

    def validate(self):
        self.require(self.low < self.high, "high", f"more than {self.low}")
        self.require(self.step >= 1 and (self.step == 1 or not self.log), "step", "at least 1, and 1 where log is true")
        self.require(not self.log or self.low > 0, "low", "positive where log is true")


@dataclasses.dataclass(frozen=True)
class Choice(Dimension):
    """One of several options without an order."""

    options: Any
    """A list of values of the field (numbers, texts, true, false, null); or changes of any fields by name, as in an
    ablation's variants. The dimension may then have any name."""

    def validate(self):
        entries = self.options
        if isinstance(entries, Mapping):
            well = all(isinstance(name, str) and isinstance(changes, Mapping) for name, changes in entries.items())
        else:
            well = isinstance(entries, Sequence) and not isinstance(entries, str)
            well = well and all(entry is None or isinstance(entry, (bool, int, float, str)) for entry in entries)
        self.require(well, "options", "a list of plain values, or a mapping from names to changes")
        self.require(len(self.names()) > 1, "options", "at least two that differ")

    def names(self) -> list[str]:
        """Names of the options."""
        entries = self.options if isinstance(self.options, Mapping) else map(json.dumps, self.options)
        return list(dict.fromkeys(entries))

    def changes(self, name: str, value: str) -> Changes:
        """The changes that an option makes, given its name."""
        return self.options[value] if isinstance(self.options, Mapping) else {name: json.loads(value)}


@dataclasses.dataclass(frozen=True)
class Search(Spec):
    """A search space, an objective, and how to search."""

    base: Experiment
    """The experiment whose fields are set."""
    dimensions: Mapping[str, Dimension]
    """The search space: a dimension per dotted field."""
    metric: str = "text/loss"
    """The objective: "task/measure" of a held-out task, or "train/loss", the mean of the last tenth of the training
    losses."""
    better: Literal["lower", "higher"] | None = None
    """Which values of the metric are better; null for what the metric itself declares."""
    against: Literal["flops", "parameters"] | None = None
    """A second objective to minimise: FLOPs of the whole run by formula, or the number of parameters. The result is
    then a Pareto front instead of one best run."""
    budget: Budget = Budget()
    """What is equal between every run and the base."""
    trials: int = 20
    """Number of runs."""
    sampler: Literal["tpe", "random", "qmc", "nsga2"] = "tpe"
    """Algorithm that proposes values: a tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011; for two
    objectives Ozaki et al., 2022), independent draws, a scrambled Sobol' sequence, or a genetic algorithm (Deb et al.,
    2002)."""
    seed: int = 0
    """Seed of the sampler. Runs keep the experiment's seed."""
    pruning: Literal["median", "halving"] | None = None
    """Pruning of poor trials. median: those worse than the median of the others at the same fraction of the run.
    halving: after 10 %, 30 % and 90 % of the run, all but the best third (asynchronous successive halving, 1810.05934).
    null: none."""

    def validate(self):
        self.require(bool(self.dimensions), "dimensions", "at least one")
        self.require(self.trials >= 1, "trials", "at least 1")
        self.require(self.seed >= 0, "seed", "at least 0")
        self.require(
            self.pruning is None or self.against is None, "pruning", "null with two objectives, which cannot be ranked"
        )
        for name, dimension in self.dimensions.items():
            _check_dimension(self.base, name, dimension)
        if self.metric in MEASURES and self.metric != TRAINING_LOSS:
            raise SpecError(f"the metric {self.metric!r} is a cost: choose a quality metric, and set `against`")
        if (self.better or self.measure.better) is None:
            raise SpecError(f"Search.better is null, and {self.metric} does not declare a direction: write --better")

    @functools.cached_property
    def measure(self) -> Measure:
        """The metric. Raises SpecError if no run measures it."""
        return measure(self.base, self.metric)

    @property
    def direction(self) -> Literal["lower", "higher"]:
        """Which values of the metric are better."""
        return self.better or self.measure.better

    def experiment(self, values: Mapping[str, Any]) -> Experiment:
        """The experiment for one value per dimension (for `Choice`, the option's name).

        Raises:
            SpecError: the values do not fit together, or the budget cannot be met.
        """
        changes = united({name: dimension.changes(name, values[name]) for name, dimension in self.dimensions.items()})
        made = self.budget.applied(replaced(self.base, changes), self.base)
        every, steps = made.train.evaluate_every, made.train.steps
        if made.evaluation.tasks and self.metric != TRAINING_LOSS:
            every = every or (max(1, steps // EVALUATIONS) if self.pruning else steps)
        log_every = 1 if self.metric == TRAINING_LOSS else made.train.log_every
        return made.replace(train=made.train.replace(evaluate_every=every, log_every=log_every))


def find_search(file: str | Path) -> Search | None:
    """Calls `search()` of a file; None if it has none.

    Raises:
        UserError: it fails or returns something else.
    """
    make = getattr(load_file(file), "search", None)
    if make is None:
        return None
    with faults_of(file):
        made = make()
    if not isinstance(made, Search):
        raise UserError(f"{file}: search() returns {type(made).__name__}: it must return a Search")
    return made


def load_search(file: str | Path, dimensions: Mapping[str, str], base: Experiment, **settings: Any) -> Search:
    """The search of a file with changes; if the file has none, a search over `dimensions`.

    Args:
        file: the file.
        dimensions: further dimensions as text (see `read_dimension`); they replace those with the same name.
        base: the experiment to start from.
        settings: fields of `Search` that override the file's.

    Raises:
        UserError: there are no dimensions, or something is invalid.
    """
    made, more = find_search(file), {name: read_dimension(base, name, text) for name, text in dimensions.items()}
    if made is not None:
        return made.replace(base=base, dimensions={**made.dimensions, **more}, **settings)
    if not more:
        raise UserError(f"{file}: no function search(): write `def search() -> Search:` in it, or give --dimension")
    return Search(base, more, **settings)


def read_dimension(base: Experiment, name: str, text: str) -> Dimension:
    """Reads a dimension from a command line: float:0:0.3, log:1e-4:1e-2, int:2:6, int:64:256:64, choice:2,4,8.

    `log` makes integers if the field holds one. Options after choice: are read like overrides and may name classes.

    Raises:
        SpecError: names the dimension and lists the forms.
    """
    kind, _, rest = text.partition(":")
    forms = "write float:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH[:STEP] or choice:A,B,..."
    if kind == "choice":
        try:
            options = [item if isinstance(item, str) else json.dumps(item) for item in json.loads(f"[{rest}]")]
        except ValueError:
            options = [item.strip() for item in rest.split(",")]
        return Choice({option: {name: _value(overrides.override(base, {name: option}), name)} for option in options})
    try:
        numbers = [float(part) if kind in ("float", "log") else int(part) for part in rest.split(":")]
    except ValueError:
        raise SpecError(f"--dimension {name}={text}: {rest!r} is not a numeric range: {forms}") from None
    if kind == "log":
        whole = isinstance(_value(base, name), int) and all(number.is_integer() for number in numbers)
        make, most, settings = (Int, 2, {"log": True}) if whole else (Float, 2, {"log": True})
        numbers = list(map(int, numbers)) if whole else numbers
    else:
        make, most, settings = {"float": (Float, 2, {}), "int": (Int, 3, {})}.get(kind, (None, 0, {}))
    if make is None or not 2 <= len(numbers) <= most:
        raise SpecError(f"--dimension {name}={text}: {forms}")
    return make(*numbers, **settings)


def _value(value: Any, name: str) -> Any:
    """The value of a dotted field; None if there is no such field."""
    for key in name.split("."):
        if isinstance(value, tuple):
            value = value[int(key)] if key.isdigit() and int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return value


def _check_dimension(base: Experiment, name: str, dimension: Dimension) -> None:
    """Raises SpecError if a dimension sets an unknown field or a wrong type. Combinations of values are checked
    later."""
    known = {field: annotation for field, annotation, _, _ in leaves(base)}
    if isinstance(dimension, Choice) and isinstance(dimension.options, Mapping):
        for option, changes in dimension.options.items():
            for field in changes:
                if field.partition(".")[0] not in {leaf.partition(".")[0] for leaf in known}:
                    raise SpecError(
                        f"dimension {name!r}, option {option!r}: no field {field!r}: {nearest(field, known)}"
                    )
        return
    if name not in known:
        raise SpecError(f"dimension {name!r}: the experiment has no such field: {nearest(name, known)}")
    values = map(json.loads, dimension.names()) if isinstance(dimension, Choice) else (dimension.low, dimension.high)
    for value in values:
        conform(known[name], value, f"dimension {name!r}")
