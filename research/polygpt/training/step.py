"""The training step, `(state, batch) -> (state, metrics)`: pure and independent of devices."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from polygpt.objectives.loss import Identity, Loss
from polygpt.sequence import Batch
from polygpt.training.randomness import DROPOUT, VIEW, derive
from polygpt.training.spikes import SpikeSpec
from polygpt.training.state import State

Step = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Inputs of the training step.

    Attributes:
        loss: model and objectives.
        transformation: maps gradients to updates.
        learning_rate: by number of updates, for reporting.
        seed: for all randomness.
        ema: decay of the moving average of the parameters, or None.
        spikes: when a step counts as a loss spike, or None for no detection.
    """

    loss: Loss
    transformation: optax.GradientTransformation
    learning_rate: optax.Schedule
    seed: int = 0
    ema: float | None = None
    spikes: SpikeSpec | None = None


def make_step(
    recipe: Recipe,
    reduce: Identity = lambda tree: tree,
    shard: Callable = lambda: 0,
    gather: Identity = lambda tree: tree,
) -> Step:
    """Builds the step function.

    Args:
        recipe: model, objectives and optimizer.
        reduce: sums a tree over all shards of the batch; the identity where one program sees the whole batch.
        shard: index of this shard of the batch, so that each draws different dropout.
        gather: joins the rows of all shards; the identity where one program sees the whole batch.

    The metrics are float32 scalars: the loss and each objective (means over the global batch, weighted by loss weight),
    gradient and update norms, the learning rate, the total number of skipped updates, the number of consecutive
    non-finite steps and, with spike detection, the number of spikes, total and consecutive.
    """
    loss = recipe.loss

    def kept(new, old):
        """`new` for trained variables; the others keep their exact value."""
        return jax.tree.map(lambda train, new, old: new if train else old, loss.trainable, new, old)

    def step(state: State, batch: Batch):
        key = jax.random.fold_in(derive(recipe.seed, state.step, DROPOUT), shard())
        seen = loss.seen(batch, derive(recipe.seed, state.step, VIEW), shard() * batch.shape[0])
        # Normalise by the global weight before taking the gradient: sums over microbatches and devices are then exact.
        weights = reduce(loss.weights(seen))
        means, gradient = reduce(
            loss.gradient(state.params, state.others, seen, weights, key, gather, shards=reduce(1))
        )
        value = loss.value(means)
        updates, opt_state = recipe.transformation.update(gradient, state.opt_state, state.params)
        if state.rate is not None:
            updates = jax.tree.map(lambda update: state.rate * update, updates)
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
        rate = recipe.learning_rate(applied) * (1 if state.rate is None else state.rate)
        metrics |= {"learning_rate": rate, "skipped": skipped, "skipped_in_row": in_row}
        if window is not None:
            metrics |= {"spikes": window.spikes, "spikes_in_row": window.in_row}
        metrics = {name: jnp.asarray(metric, jnp.float32) for name, metric in metrics.items()}
        after = {"params": params, "opt_state": opt_state, "ema": ema, "window": window}
        after |= {"step": state.step + 1, "skipped": skipped, "skipped_in_row": in_row}
        return dataclasses.replace(state, **after), metrics

    return step
