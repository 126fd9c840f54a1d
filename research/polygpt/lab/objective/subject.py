"""The objective being checked: a small model with random parameters, its rows, and a compiled program per question."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.errors import UserError
from polygpt.lab.compiled import compiled
from polygpt.lab.measured import difference, rounding
from polygpt.lab.objective import rows
from polygpt.models.functional import Model, bind
from polygpt.objectives.base import BatchObjective, Objective
from polygpt.objectives.forward import Forward
from polygpt.objectives.loss import Loss
from polygpt.overrides import override
from polygpt.sequence import Batch, check
from polygpt.training.randomness import DROPOUT, VIEW, derive

NAME = "checked"
"""The name of the objective in a loss."""
NOISE = 8192.0
"""The numbers of hidden vectors at padding, in `NoisyAtPadding`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """What an objective gives for a batch.

    Attributes:
        total, weight: float32 scalars.
        gradient: of the total with respect to the parameters.
    """

    total: jax.Array
    weight: jax.Array
    gradient: Any

    @property
    def mean(self) -> tuple:
        """The mean loss, and its gradient."""
        divisor = float(self.weight) or 1.0
        return float(self.total) / divisor, jax.tree.map(lambda x: np.asarray(x) / divisor, self.gradient)

    def off_by(self, other: "Result") -> float:
        """The largest difference from another result, see `off_by`."""
        return off_by(tuple(vars(self).values()), tuple(vars(other).values()))


def off_by(got: tuple, expected: tuple) -> float:
    """The largest difference between the parts of two results, each relative to its largest entry; or NaN."""
    return float(np.max([difference(a, b) for a, b in zip(got, expected, strict=True)]))  # Python's max overlooks NaN


class NoisyAtPadding:
    """A model whose hidden vectors at padding are large, and whose logits there are not numbers."""

    def __init__(self, model: Model):
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def hidden(self, params: Any, batch: Batch, key: jax.Array | None = None, capture: tuple[str, ...] = ()) -> tuple:
        """As `Model.hidden`."""

        def noisy(x):
            return jnp.where((batch.segment_BT == 0)[..., None], NOISE, x).astype(x.dtype)

        hidden_BTD, losses, *captured = self._model.hidden(params, batch, key, capture)
        sites = [{site: x if "/" in site else noisy(x) for site, x in found.items()} for found in captured]
        return noisy(hidden_BTD), losses, *sites

    def logits(self, params: Any, hidden_BTD: jax.Array) -> jax.Array:
        """As `Model.logits`."""
        noisy_BT1 = jnp.all(hidden_BTD == NOISE, axis=-1, keepdims=True)
        return self._model.logits(params, hidden_BTD) + jnp.where(noisy_BT1, jnp.nan, 0.0)  # gradients pass


class Subject:
    """An objective, with the model, rows and programs that measure its properties.

    Args:
        objective: the objective.

    Attributes:
        model: the model, of `rows.MODEL` and what the objective needs.
        params: the initial parameters plus noise, so that nothing that the model computes stays without effect.
        others: parameters of the models that it reads besides, by name.
        batch: the rows, of NumPy arrays.
        bound: the largest relative difference that rounding explains.
    """

    def __init__(self, objective: Objective):
        self.objective, self.needs = objective, objective.needs
        self.batch_wide = isinstance(objective, BatchObjective)
        spec = override(rows.MODEL, self.needs.model)
        self.model = bind(spec, rows.VOCABULARY)
        self.params = self.parameters(0)
        self.others = {name: self.parameters(number) for number, name in enumerate(objective.others, start=1)}
        self.batch = self.completed(rows.packed(spec.adapters, self.needs.together))
        self.bound = rounding(rows.LENGTH, rows.WIDTH + rows.VOCABULARY)
        self.result = functools.partial(self.measure, self.model)

    @functools.cached_property
    def _initial(self) -> Any:
        return compiled(self.model.init)(jax.random.key(0))

    def parameters(self, seed: int) -> Any:
        """Initial parameters plus noise."""
        rng = np.random.default_rng(seed)

        def noisy(x):
            return np.float32(x + rng.normal(0, 0.2, x.shape)) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(noisy, jax.device_get(self._initial))

    def completed(self, batch: Batch) -> Batch:
        """A batch with the arrays that the objective reads besides those of every batch."""
        return batch if self.needs.rows is None else self.needs.rows(batch, rows.numbers(batch))

    def loss(self, **fields) -> Loss:
        """The loss that consists of the objective; keywords are fields of it."""
        return Loss(self.model, {NAME: (self.objective, 1.0)}, self.trainable, **fields)

    @functools.cached_property
    def view_program(self) -> Callable:
        return compiled(self.loss().seen)

    def viewed(self, batch: Batch, step: int = 0, first_row: int = 0) -> Batch:
        """What the objective reads of a batch at a step of seed 0, of NumPy arrays."""
        if self.objective.view is None:
            return batch
        (seen,) = self.view_program(batch, derive(0, step, VIEW), first_row)
        return jax.device_get(seen)

    @functools.cached_property
    def seen(self) -> Batch:
        """What the objective reads of `batch`."""
        return self.viewed(self.batch)

    @functools.cached_property
    def trainable(self) -> Any:
        """A tree of bools: which parameters are trained."""
        return jax.tree.map(lambda traits: traits.trained, self.model.traits)

    def forward(self, params: Any, others: Mapping[str, Any], batch: Batch, key=None, model=None, logits_block=None):
        """The `Forward` that the objective reads."""
        model = model or self.model
        others = {name: (model, own) for name, own in others.items()}
        return Forward(model, params, batch, key, others, logits_block, self.trainable, self.objective.captures)

    def pair(self, params: Any, others: Mapping[str, Any], batch: Batch, *rest, **options) -> tuple:
        """(total, weight); the arguments are those of `forward`."""
        forward = self.forward(params, others, batch, *rest, **options)
        return self.objective.total(forward, batch), self.objective.weight(batch)

    def fresh(self, model: Any) -> Callable:
        """A newly traced program for `measure`."""

        def run(params, others, batch, key):
            def total(params):
                return self.pair(params, others, batch, key, model)

            (value, weight), gradient = jax.value_and_grad(total, has_aux=True, allow_int=True)(params)
            return Result(value, weight, self.trained(gradient))

        return compiled(run)

    @functools.cached_property
    def _programs(self) -> dict[int, tuple[Any, Callable]]:
        return {}

    def measure(self, model: Model, batch: Batch, params: Any = None, key: jax.Array | None = None) -> Result:
        """The result for a batch, which is a view if the objective has one, as in training with this key."""
        if id(model) not in self._programs:
            self._programs[id(model)] = model, self.fresh(model)
        key = derive(0, 0, DROPOUT) if key is None else key
        arguments = self.params if params is None else params, self.others, batch, key
        return jax.device_get(self._programs[id(model)][1](*arguments))

    @functools.cached_property
    def usual(self) -> Result:
        """The result for `seen`."""
        return self.result(self.seen)

    @functools.cached_property
    def weightless(self) -> Result:
        """The result for `seen` without any loss weight."""
        return self.result(self.seen.replace(weight_BT=np.zeros_like(self.seen.weight_BT)))

    @property
    def reads_weights(self) -> bool:
        """Whether the loss weights change anything."""
        return not self.weightless.off_by(self.usual) == 0

    @property
    def scores_without_weights(self) -> bool:
        """Whether something is scored whatever the loss weights are: the gradient without any is finite and not 0."""
        parts = [np.asarray(x) for x in jax.tree.leaves(self.weightless.gradient)]
        return all(np.isfinite(x).all() for x in parts) and any(x.any() for x in parts)

    @staticmethod
    def summed(one: Result, other: Result, none: Result) -> Result:
        """The sum of two parts' results, less what both have of `none`, the result of no part, where that is finite."""
        return jax.tree.map(lambda a, b, c: a + b - np.where(np.isfinite(c), c, 0), one, other, none)

    def mean(self, loss: Loss, batch: Batch, step: int = 0) -> tuple:
        """The mean and its gradient from a loss, as a training step of seed 0 computes them; see `Result.mean`."""

        def run(params, others, batch):
            seen = loss.seen(batch, derive(0, step, VIEW))
            weights = loss.weights(seen)
            means, gradient = loss.gradient(params, others, seen, weights, derive(0, step, DROPOUT))
            return means[NAME], gradient

        mean, gradient = jax.device_get(compiled(run)(self.params, self.others, batch))
        return float(mean), self.trained(gradient)

    def trained(self, gradient: Any) -> Any:
        """The gradient of the parameters that are trained."""
        return jax.tree.map(lambda trained, x: x if trained else None, self.trainable, gradient)

    @functools.cached_property
    def noisy_at_padding(self) -> "NoisyAtPadding":
        """The model with large vectors at padding."""
        return NoisyAtPadding(self.model)

    def taken(self, order: list) -> Batch:
        """Other rows of the data, see `rows.taken`, as the objective reads them; nothing is drawn again.

        A view that renumbers segments is derived from the other rows.
        """
        if np.array_equal(self.seen.segment_BT, self.batch.segment_BT):
            return rows.taken(self.seen, order, self.model.positions)
        return self.viewed(rows.taken(self.batch, order, self.model.positions))

    def fault_of_view(self) -> str:
        """What is wrong with the layout of the view's rows; "" if nothing is."""
        seen, batch = self.seen, self.batch
        for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(seen), jax.tree.leaves(batch), strict=True):
            if (np.shape(new), np.result_type(new)) != (np.shape(old), np.result_type(old)):
                form = f"{np.result_type(new)}{list(np.shape(new))}"
                due = f"{np.result_type(old)}{list(np.shape(old))}"
                return f"the view's {jax.tree_util.keystr(path)[1:]} is {form}, but must be {due}"
        try:
            places = {"segment_BT": batch.segment_BT, "position_BT": batch.position_BT}  # a view may change both
            check(seen.replace(**places), self.model.vocabulary, self.model.positions)
        except UserError as error:
            return f"the view's {error}"
        return ""
