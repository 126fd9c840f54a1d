"""The training state: everything that a step changes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from polygpt.objectives.forward import AVERAGE
from polygpt.parameters import name_of
from polygpt.training.randomness import INIT, derive
from polygpt.training.spikes import SpikeSpec, Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state between steps.

    Attributes:
        step: int32, steps taken.
        params: the model's parameters, float32.
        opt_state: state of the optimizer.
        ema: exponential moving average of the parameters, or None.
        skipped: int32, skipped updates (non-finite loss, gradient or update, or a loss spike).
        skipped_in_row: int32, consecutive non-finite steps.
        window: recent losses for spike detection, or None without it.
        references: parameters of the models that are not trained, by name. Checkpoints do not hold them.
        rate: float32, scale of the learning rate, or None without `train.plateau`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    skipped_in_row: jax.Array
    window: Window | None = None
    references: dict[str, Any] = dataclasses.field(default_factory=dict)
    rate: jax.Array | None = None

    @property
    def eval_params(self):
        """The parameters for evaluation: the moving average if there is one."""
        return self.params if self.ema is None else self.ema

    @property
    def others(self) -> dict[str, Any]:
        """Parameters that objectives may read and that are not trained, by name."""
        return self.references if self.ema is None else {**self.references, AVERAGE: self.ema}


def create(
    model,
    transformation: optax.GradientTransformation,
    seed: int,
    ema: bool,
    spikes: SpikeSpec | None = None,
    given: Mapping[str, jax.Array] | None = None,
) -> State:
    """The state before the first step; compile it, so that no two leaves share a buffer.

    `given` has the values of the parameters that are not random, by name.
    """
    given = given or {}
    params = jax.tree_util.tree_map_with_path(
        lambda path, random: given.get(name_of(path), random), model.init(derive(seed, 0, INIT))
    )
    zero = jnp.zeros((), jnp.int32)
    average, window = params if ema else None, spikes.begin() if spikes else None
    return State(zero, params, transformation.init(params), average, zero, zero, window)
