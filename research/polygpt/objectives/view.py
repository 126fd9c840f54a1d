"""Views: batches that objectives derive from the batch of the data, such as one with masked tokens."""

import dataclasses

import jax

from polygpt.sequence import Batch
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class View(Spec):
    """Base of all views. A new one is a file with a subclass that defines `__call__`.

    It is computed on the device before the batch is split into microbatches. The keys of a row depend only on the seed,
    the step and the row's index in the global batch, so a view does not depend on devices and microbatches either.
    """

    @property
    def shown(self) -> float:
        """The fraction of the scored tokens that the model may read, such as those that masking leaves in place."""
        return 0.0

    def __call__(self, batch: Batch, keys_B: jax.Array) -> Batch:
        """The derived batch, of the same shape: a pure function of each row and its random key."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")


def uniform(keys_B: jax.Array, *shape: int) -> jax.Array:
    """Uniform random numbers in [0, 1), float32 [B, *shape], given a key for each row."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys_B)
