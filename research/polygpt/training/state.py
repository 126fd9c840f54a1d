"""Everything that a training step changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polygpt.training.randomness import INIT, derive
from polygpt.training.spikes import SpikeSpec, Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state between two steps.

    Attributes:
        step: int32, steps taken.
        params: the model's parameters, float32.
        opt_state: the optimizer's.
        ema: exponential moving average of the parameters, or None.
        skipped: int32, updates left out: loss, gradient or update were not finite, or the loss was a spike.
        skipped_in_row: int32, how many of the last steps were not finite.
        window: what spikes of the loss stand out from, or None if nobody looks for them.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    skipped_in_row: jax.Array
    window: Window | None = None

    @property
    def averaged(self):
        """The parameters to evaluate with: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def create(
    model, transformation: optax.GradientTransformation, seed: int, ema: bool, spikes: SpikeSpec | None = None
) -> State:
    """The state before the first step; to be compiled, so that no two leaves share a buffer."""
    params = model.init(derive(seed, 0, INIT))
    zero = jnp.zeros((), jnp.int32)
    average, window = params if ema else None, spikes.begin() if spikes else None
    return State(zero, params, transformation.init(params), average, zero, zero, window)
