"""SigLIP: decides of each pair of examples whether they belong together."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.contrastive import Compared, Contrastive


@dataclasses.dataclass(frozen=True)
class SigLIP(Contrastive):
    """Binary cross entropy in nats of all pairs of the batch, summed over the pairs of an example: Zhai et al.
    (2303.15343), section 3.2. Give the projection a bias of -10 and a temperature of 0.1 as there, because most pairs
    do not belong together."""

    def sum_over(self, compared: Compared) -> jax.Array:
        numbers_N = jnp.arange(compared.left.shape[0])

        def chunk(left_CK, number_C, valid_C):
            logits_CN = compared.scale * left_CK @ compared.right.T + compared.bias
            sign_CN = jnp.where(number_C[:, None] == numbers_N[None], 1.0, -1.0)
            used_CN = valid_C[:, None] & compared.valid[None]
            return -jnp.sum(jnp.where(used_CN, jax.nn.log_sigmoid(sign_CN * logits_CN), 0))

        return self.by_chunks(chunk, compared.left, numbers_N, compared.valid)
