"""What an objective is: a sum and a weight, so that its mean over the global batch is exact however rows are split."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.sequence import Batch
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Objective(Spec):
    """Base of all objectives. A new one is a file with a subclass that defines `total`.

    The loss is `total / weight`, each summed over all microbatches and devices first. So the weight may depend on the
    batch alone, never on the model's outputs: it must be known before the first gradient is taken.
    """

    def total(self, outputs, batch: Batch) -> jax.Array:
        """The weighted sum of the loss over the positions of `batch`: float32 scalar. `outputs` holds logits_BTV."""
        raise NotImplementedError(f"{type(self).__name__} defines no total")

    def weight(self, batch: Batch) -> jax.Array:
        """What `total` is divided by: float32 scalar, the sum of the loss weights unless a subclass says otherwise."""
        return jnp.sum(batch.weight_BT, dtype=jnp.float32)

    def __call__(self, outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum, weight), float32 scalars."""
        return self.total(outputs, batch), self.weight(batch)


def weighted_logits(outputs, batch: Batch) -> jax.Array:
    """float32 [B, T, V]: the logits, 0 where the loss weight is 0.

    What a position without weight holds, even NaN, then reaches neither the sum nor any gradient.
    """
    return jnp.where((batch.weight_BT != 0)[..., None], outputs.logits_BTV.astype(jnp.float32), 0.0)
