"""The objective contract: a sum and a weight, so that the mean over the global batch is exact however it is split."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.sequence import Batch
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Objective(Spec):
    """Base of all objectives. A new one is a file with a subclass that defines `total`.

    The loss is `total / weight`, each first summed over all microbatches and devices. The weight must depend only on
    the batch, never on the model's outputs, because it is needed before the first gradient is computed.
    """

    def total(self, outputs, batch: Batch) -> jax.Array:
        """The weighted sum of the loss over the positions of `batch`: float32 scalar. `outputs` holds logits_BTV."""
        raise NotImplementedError(f"{type(self).__name__} defines no total")

    def weight(self, batch: Batch) -> jax.Array:
        """The denominator of the loss: float32 scalar, by default the sum of the loss weights."""
        return jnp.sum(batch.weight_BT, dtype=jnp.float32)

    def __call__(self, outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum, weight), float32 scalars."""
        return self.total(outputs, batch), self.weight(batch)


def weighted_logits(outputs, batch: Batch) -> jax.Array:
    """float32 [B, T, V]: the logits, set to 0 where the loss weight is 0.

    This keeps positions without weight, even NaN ones, out of the sum and of all gradients.
    """
    return jnp.where((batch.weight_BT != 0)[..., None], outputs.logits_BTV.astype(jnp.float32), 0.0)
