"""Regularisation of the softmax normaliser."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.base import Objective, weighted_logits
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class ZLoss(Objective):
    """log² Z, where Z is the softmax normaliser (Chowdhery et al. 2022, PaLM, section 5, weight 1e-4)."""

    def total(self, outputs, batch: Batch) -> jax.Array:
        log_z_BT = jax.nn.logsumexp(weighted_logits(outputs, batch), axis=-1)
        return jnp.sum(batch.weight_BT * jnp.square(log_z_BT))
