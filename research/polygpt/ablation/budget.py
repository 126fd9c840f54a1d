"""What is kept equal between variants: steps, tokens or FLOPs, and the number of parameters."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import jax

from polygpt import spec
from polygpt.errors import SpecError
from polygpt.models.functional import bind
from polygpt.overrides import replaced
from polygpt.scale.plan.flops import flops
from polygpt.spec import Spec
from polygpt.training.experiment import Experiment
from polygpt.training.phase import expanded, steps_of

NEAR = 1e-3
"""Relative tolerance, of the count or of the value, at which the search for equal parameters stops."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What an experiment's model and training step cost.

    Attributes:
        parameters: exact count.
        flops: FLOPs per training step, forward and backward, by the formula of `scale/plan/flops.py`; the mean over the
            steps of all phases.
        positions: positions per batch, B T, padding included; the mean over the steps of all phases.
    """

    parameters: int
    flops: float
    positions: int


def costs(experiment: Experiment) -> Costs:
    """Costs by formula; allocates nothing."""
    vocabulary = experiment.tokenizer.build().vocabulary
    parts = list(zip(expanded(experiment), steps_of(experiment), strict=True))
    total = sum(steps for _, steps in parts)
    each = sum(steps * flops(part, vocabulary).useful for part, steps in parts) / total
    positions = sum(steps * part.data.batch_size * part.data.layout.seq_len for part, steps in parts) / total
    return Costs(parameters(experiment), each, round(positions))


def parameters(experiment: Experiment) -> int:
    """Exact count."""
    return _parameters(json.dumps(spec.to_json(experiment.model)), experiment.tokenizer.build().vocabulary)


@functools.lru_cache(4096)
def _parameters(model: str, vocabulary: int) -> int:
    shapes = bind(spec.from_json(json.loads(model)), vocabulary).abstract()
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@dataclasses.dataclass(frozen=True)
class Budget(Spec):
    """What is equal between a variant and the base, at the same values of all factors."""

    by: Literal["steps", "tokens", "flops", "parameters"] = "steps"
    """What is kept equal. steps, parameters: leave `train.steps` unchanged. tokens, flops: set `train.steps` so that
    the run sees as many batch positions, or takes as many FLOPs, as the base."""
    field: str | None = None
    """Dotted numeric field, such as "model.decoder.mlp.factor", to set so that the model also has as many parameters as
    the base; parameters must increase with it. null: leave parameters unchanged. Required if `by` is parameters."""
    tolerance: float = 0.02
    """Relative deviation from the base that is allowed."""

    def validate(self):
        self.require(self.tolerance >= 0, "tolerance", "at least 0")
        self.require(self.field is not None or self.by != "parameters", "field", "set if by is parameters")

    def applied(self, experiment: Experiment, base: Experiment) -> Experiment:
        """The experiment, matched to the base: first its parameters, then the number of steps.

        Raises:
            SpecError: no value is within the tolerance.
        """
        if experiment == base:
            return experiment
        if self.field is not None:
            experiment = self._with_parameters(experiment, parameters(base))
        if self.by in ("steps", "parameters"):
            return experiment
        if experiment.train.phases or base.train.phases:
            fault = "the costs of a run in phases change with its steps"
            raise SpecError(f"budget.by is {self.by!r}: {fault}: use 'steps'")
        if self.by == "tokens":
            each, of_base = (made.data.batch_size * made.data.layout.seq_len for made in (experiment, base))
        else:
            each, of_base = (costs(made).flops for made in (experiment, base))
        wanted = base.train.steps * of_base
        steps = max(1, round(wanted / each))
        self._require_near(steps * each, wanted, f"{steps:,} steps", self.by)
        return experiment.replace(train=experiment.train.replace(steps=steps))

    def _with_parameters(self, experiment: Experiment, wanted: int) -> Experiment:
        value = _value(experiment, self.field)
        found: dict[Any, int | None] = {}

        def count(candidate) -> int | None:
            """Number of parameters with this value; None if the experiment rejects it."""
            if candidate not in found:
                try:
                    found[candidate] = parameters(replaced(experiment, {self.field: candidate}))
                except SpecError:
                    found[candidate] = None
            return found[candidate]

        count(value)
        _bisect(count, value, wanted)
        best = min((abs(n - wanted), c) for c, n in found.items() if n is not None)[1]
        self._require_near(found[best], wanted, f"{self.field} {best:.6g}", "parameters")
        return replaced(experiment, {self.field: best})

    def _require_near(self, has: float, wanted: float, how: str, what: str) -> None:
        if abs(has / wanted - 1) > self.tolerance:
            raise SpecError(
                f"budget: with {how} it has {has:,.0f} {what}, but the base has {wanted:,.0f}: no value is within "
                f"the tolerance of {self.tolerance:.1%}: raise it, or change the base"
            )


def _bisect(count: Callable[[Any], int | None], value: int | float, wanted: int) -> None:
    """Bisects for the value at which `count` crosses `wanted`, starting from `value`."""
    whole = isinstance(value, int)
    grain = _grain(count, value) if whole else None

    def at(k):  # integers in multiples of the grain, floats by factors
        return value + k * grain if whole else value * 2.0**k

    up = (count(value) or 0) < wanted
    inner, outer = 0, 1
    while (n := count(at(outer if up else -outer))) is not None and (n < wanted) == up and outer < 2**20:
        inner, outer = outer, 2 * outer
    low, high = (inner, outer) if up else (-outer, -inner)
    while high - low > (1 if whole else NEAR):
        middle = (low + high) // 2 if whole else (low + high) / 2
        n = count(at(middle))
        if n is not None and abs(n - wanted) <= NEAR * wanted:
            return
        # A rejected value counts as past the far end.
        beyond = up if n is None else n >= wanted
        low, high = (low, middle) if beyond else (middle, high)


def _grain(count: Callable[[int], int | None], value: int) -> int:
    """The smallest step between allowed integers: a width, for example, must be a multiple of its heads."""
    for grain in range(1, max(value, 1) + 1):
        if count(value + grain) is not None and count(value + 2 * grain) is not None:
            return grain
    return max(value, 1)


def _value(experiment: Experiment, field: str) -> int | float:
    value: Any = experiment
    for key in field.split("."):
        if isinstance(value, Spec):
            value = getattr(value, key, None)
        else:
            value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"budget: {field} is {value!r}: it must be a number in every variant")
    return value
