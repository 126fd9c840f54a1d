"""InfoNCE: finds the partner of each example among all of the batch."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.contrastive import Compared, Contrastive


@dataclasses.dataclass(frozen=True)
class InfoNCE(Contrastive):
    """Cross entropy in nats of the partner among the examples of the batch, the mean of both directions: CLIP
    (2103.00020), Figure 3; the loss of van den Oord et al. (1807.03748), equation 4."""

    def sum_over(self, compared: Compared) -> jax.Array:
        forward = self._direction(compared.left, compared.right, compared)
        return (forward + self._direction(compared.right, compared.left, compared)) / 2

    def _direction(self, query_NK: jax.Array, key_NK: jax.Array, compared: Compared) -> jax.Array:
        def chunk(query_CK, own_CK, valid_C):
            similarity_CN = compared.scale * query_CK @ key_NK.T
            normalizer_C = jax.nn.logsumexp(jnp.where(compared.valid[None], similarity_CN, -1e30), axis=1)
            return jnp.sum(jnp.where(valid_C, normalizer_C - compared.scale * jnp.sum(query_CK * own_CK, axis=1), 0))

        return self.by_chunks(chunk, query_NK, key_NK, compared.valid)
