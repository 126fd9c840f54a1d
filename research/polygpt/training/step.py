"""The training step, `(state, batch) -> (state, metrics)`: pure and independent of devices."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polygpt.objectives.base import Objective, TokenObjective, depends_on_scores_only
from polygpt.objectives.blocked import token_losses
from polygpt.sequence import Batch
from polygpt.training.randomness import DROPOUT, derive
from polygpt.training.spikes import SpikeSpec
from polygpt.training.state import State

Step = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Inputs of the training step.

    Attributes:
        model: has `apply(params, batch, key) -> outputs`.
        objectives: by name, each with its weight in the loss.
        transformation: maps gradients to updates.
        learning_rate: by number of updates, for reporting.
        trainable: a tree of bools with the structure of the parameters.
        seed: for all randomness.
        accumulate: number of microbatches; must divide the batch size.
        ema: decay of the moving average of the parameters, or None.
        spikes: when a step counts as a loss spike, or None for no detection.
        logits_block: number of positions whose logits exist at a time, or None for all.
    """

    model: Any
    objectives: Mapping[str, tuple[Objective, float]]
    transformation: optax.GradientTransformation
    learning_rate: optax.Schedule
    trainable: Any
    seed: int = 0
    accumulate: int = 1
    ema: float | None = None
    spikes: SpikeSpec | None = None
    logits_block: int | None = None

    def blocked(self) -> dict[str, TokenObjective]:
        """The objectives that are computed without the logits of the whole batch."""
        return {
            name: objective
            for name, (objective, _) in self.objectives.items()
            if self.logits_block is not None and depends_on_scores_only(objective)
        }


def make_step(recipe: Recipe, reduce: Callable = lambda tree: tree, shard: Callable = lambda: 0) -> Step:
    """Builds the step function.

    Args:
        recipe: model, objectives and optimizer.
        reduce: sums a tree over all shards of the batch; the identity where one program sees the whole batch.
        shard: index of this shard of the batch, so that each draws different dropout.

    The metrics are float32 scalars: the loss and each objective (means over the global batch, weighted by loss weight),
    gradient and update norms, the learning rate, the total number of skipped updates, the number of consecutive
    non-finite steps and, with spike detection, the number of spikes, total and consecutive.
    """

    def loss(params, batch, key, weights):
        params = jax.tree.map(lambda p, train: p if train else jax.lax.stop_gradient(p), params, recipe.trainable)
        outputs = recipe.model.apply(params, batch, key)
        counts = {name: jnp.where(weight > 0, weight, 1.0) for name, weight in weights.items()}
        blocked = recipe.blocked()
        means = {
            name: objective.total(outputs, batch) / counts[name]
            for name, (objective, _) in recipe.objectives.items()
            if name not in blocked
        }
        value = sum(recipe.objectives[name][1] * mean for name, mean in means.items())
        if blocked:
            shares = {name: recipe.objectives[name][1] / counts[name] for name in blocked}
            head = recipe.model.head(params)
            own, totals = token_losses(blocked, shares, outputs.hidden_BTD, head, batch, recipe.logits_block)
            value, means = value + own, means | {name: total / counts[name] for name, total in totals.items()}
        return value, means

    def kept(new, old):
        """`new` for trained variables; the others keep their exact value."""
        return jax.tree.map(lambda train, new, old: new if train else old, recipe.trainable, new, old)

    def step(state: State, batch: Batch):
        key = jax.random.fold_in(derive(recipe.seed, state.step, DROPOUT), shard())
        # Normalise by the global weight before taking the gradient: sums over microbatches and devices are then exact.
        weights = reduce({name: objective.weight(batch) for name, (objective, _) in recipe.objectives.items()})

        def part(batch, index):
            (value, means), gradient = jax.value_and_grad(loss, has_aux=True, allow_int=True)(
                state.params, batch, jax.random.fold_in(key, index), weights
            )
            return value, means, jax.tree.map(_without_float0, gradient)

        value, means, gradient = reduce(sum_over_microbatches(part, batch, recipe.accumulate))
        updates, opt_state = recipe.transformation.update(gradient, state.opt_state, state.params)
        params = kept(optax.apply_updates(state.params, updates), state.params)
        applied = state.step - state.skipped
        ema = state.ema
        if recipe.ema is not None:
            # Decay faster early on, so that the initial parameters do not linger (like TensorFlow's num_updates).
            decay = jnp.minimum(recipe.ema, (1 + applied) / (10 + applied))
            ema = kept(jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, ema, params), ema)

        gradient_norm, update_norm = optax.tree.norm(gradient), optax.tree.norm(updates)
        # All quantities are already global, so all devices make the same decision.
        finite = jnp.isfinite(value) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
        in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
        taken, window = finite, state.window
        if recipe.spikes is not None:
            spike, window = recipe.spikes.judge(window, value, gradient_norm, finite)
            taken = finite & ~spike
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        skipped = state.skipped + ~taken
        metrics = {"loss": value} | {f"loss/{name}": mean for name, mean in means.items()}
        metrics |= {"gradient_norm": gradient_norm, "update_norm": update_norm}
        metrics |= {"learning_rate": recipe.learning_rate(applied), "skipped": skipped, "skipped_in_row": in_row}
        if window is not None:
            metrics |= {"spikes": window.spikes, "spikes_in_row": window.in_row}
        metrics = {name: jnp.asarray(metric, jnp.float32) for name, metric in metrics.items()}
        return State(state.step + 1, params, opt_state, ema, skipped, in_row, window), metrics

    return step


def _without_float0(gradient: jax.Array) -> jax.Array:
    """A gradient; that of whole numbers, which have none, as zeros."""
    return jnp.zeros(gradient.shape) if gradient.dtype == jax.dtypes.float0 else gradient


def sum_over_microbatches(function: Callable, batch: Batch, parts: int):
    """The sum of `function(microbatch, index)`, a tree, over `parts` equal parts of the rows, taken one at a time."""
    if parts == 1:
        return function(batch, 0)
    # Every parts-th row, not a run of them: rows that lie on a device stay there.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first, 0))
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]
