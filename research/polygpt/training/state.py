"""Everything that a training step changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polygpt.training.randomness import INIT, derive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state between two steps.

    Attributes:
        step: int32, batches consumed.
        params: the model's parameters, float32.
        opt_state: the optimizer's.
        ema: exponential moving average of the parameters, or None.
        skipped: int32, updates left out because loss, gradient or update were not finite.
        skipped_in_row: int32, how many of them the last steps were.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    skipped_in_row: jax.Array

    @property
    def averaged(self):
        """The parameters to evaluate with: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def create(model, transformation: optax.GradientTransformation, seed: int, ema: bool) -> State:
    """The state before the first step; to be compiled, so that no two leaves share a buffer."""
    params = model.init(derive(seed, 0, INIT))
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, transformation.init(params), params if ema else None, zero, zero)
