"""Base of the objectives of routed layers, which read a loss summed over the model's layers."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.objectives.needs import Needs
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class RoutingObjective(Objective):
    """A loss summed over the routed layers, per real position of the batch; padding is excluded."""

    loss: ClassVar[str]
    """The name of the loss in the model's outputs."""

    @property
    def needs(self) -> Needs:
        experts = {"decoder.mlp": "polygpt.nn.experts:MixtureOfExperts", "decoder.mlp.experts": "4"}
        return Needs("a routed layer", experts)

    def total(self, outputs, batch: Batch) -> jax.Array:
        if self.loss not in outputs.losses:
            raise SpecError(
                f"{type(self).__name__} needs {self.loss!r}, which no layer of the model computes: remove the "
                "objective, or set model.decoder.mlp to polygpt.nn.experts:MixtureOfExperts"
            )
        return outputs.losses[self.loss]

    def weight(self, batch: Batch) -> jax.Array:
        return jnp.sum(batch.segment_BT > 0, dtype=jnp.float32)
