"""What objectives of routed layers share: they read a loss that the model's layers have summed."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class RoutingObjective(Objective):
    """A loss of the routed layers, summed over them, a real position of the batch: padding counts nowhere."""

    loss: ClassVar[str]
    """Its name among the model's losses."""

    def total(self, outputs, batch: Batch) -> jax.Array:
        if self.loss not in outputs.losses:
            raise SpecError(
                f"{type(self).__name__} needs {self.loss!r}, which no layer of the model gives: leave the objective "
                "out, or choose polygpt.nn.experts:MixtureOfExperts for model.decoder.mlp"
            )
        return outputs.losses[self.loss]

    def weight(self, batch: Batch) -> jax.Array:
        return jnp.sum(batch.segment_BT > 0, dtype=jnp.float32)
