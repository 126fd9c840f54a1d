"""Linear attention with a feature map and a normaliser."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Attention, Dims
from polygpt.attention.kernels.recurrence import linear_recurrence
from polygpt.attention.recurrent import Recurrent, RecurrentModule
from polygpt.nn.norms import Norm


@dataclasses.dataclass(frozen=True)
class LinearAttention(Recurrent):
    """Softmax replaced by phi(q) phi(k)^T, phi = elu + 1. Katharopoulos et al. (2006.16236, eq. 7 to 12, 16 to 20).

    y_t = phi(q_t)^T S_t / phi(q_t)^T z_t with S_t = S_{t-1} + phi(k_t) v_t^T and z_t = z_{t-1} + phi(k_t). A rotary
    encoding is applied to phi(q) and phi(k) only in the numerator, so that no weight of the normaliser is negative: Su
    et al., RoFormer (2104.09864, eq. 19).
    """

    paper = "2006.16236"

    norm: Norm | None = None
    """Normalisation of each head's output."""

    def mup_scaled(self, width: int, base: Attention, base_width: int) -> Attention:
        return self  # the output is a ratio of two sums over the channels of a head

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return LinearAttentionModule(self, dims, rngs)


class LinearAttentionModule(RecurrentModule):
    def placed(self, x_BHTd, context):
        return jax.nn.elu(x_BHTd.astype(jnp.float32)) + 1

    def recur(self, starts, query_BHTd, key_BHTd, value_BHTe, x_BTD, context, state):
        rotated = self.rotated(query_BHTd, context), self.rotated(key_BHTd, context)
        ones_BHT1 = jnp.ones_like(value_BHTe[..., :1])
        none, chunk = self.log_decay(x_BTD), self.spec.chunk
        y_BHTe, values = linear_recurrence(starts, *rotated, value_BHTe, none, state["values"], chunk)
        z_BHT1, ones = linear_recurrence(starts, query_BHTd, key_BHTd, ones_BHT1, none, state["ones"], chunk)
        return y_BHTe / jnp.maximum(z_BHT1, 1e-6), {"values": values, "ones": ones}

    def empty_state(self, rows):
        values = super().empty_state(rows)
        return {"values": values, "ones": values[..., :1]}
