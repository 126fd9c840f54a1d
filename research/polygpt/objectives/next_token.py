"""Cross entropy of the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.base import Objective, weighted_logits
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Cross entropy of the next token in nats, weighted by the loss weights (0 on prompts and padding)."""

    label_smoothing: float = 0.0
    """Fraction of the target probability spread evenly over the vocabulary (Szegedy et al. 2016, section 7)."""

    def validate(self):
        self.require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")

    def total(self, outputs, batch: Batch) -> jax.Array:
        logits_BTV = weighted_logits(outputs, batch)
        # A one-hot comparison fuses with the sum; the gradient of a gather would be a scatter.
        at_target_BTV = jax.nn.one_hot(batch.target_BT, logits_BTV.shape[-1], dtype=bool)
        target_BT = jnp.sum(jnp.where(at_target_BTV, logits_BTV, 0.0), axis=-1)
        smooth = self.label_smoothing
        loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - (1 - smooth) * target_BT
        if smooth:  # 0 times a mean over logits of -inf would be NaN
            loss_BT = loss_BT - smooth * jnp.mean(logits_BTV, axis=-1)
        return jnp.sum(batch.weight_BT * loss_BT)
