"""DeltaNet: linear attention whose state replaces the value stored at a key instead of adding to it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.kernels.recurrence import delta_rule
from polygpt.attention.recurrent import Recurrent, RecurrentModule
from polygpt.nn.linear import Linear
from polygpt.nn.mlp import Activation


@dataclasses.dataclass(frozen=True)
class DeltaNet(Recurrent):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, beta_t = sigmoid(x_t w). Yang et al. (2406.06484).

    Recurrence in section 2.2, chunkwise form in 3.2 and 3.3, layer in 3.4: a short convolution and silu on queries,
    keys and values, queries and keys of unit length, normalised output per head. No rotary encoding.
    """

    paper = "2406.06484"

    convolution: int = 4
    """Kernel size of a causal convolution over the projections; 0 for none."""
    rotates: bool = False
    """Whether the position encoding rotates queries and keys."""
    activation: Activation = "silu"
    """Activation of queries, keys and values after projection and convolution."""

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return DeltaNetModule(self, dims, rngs)

    def score_flops(self, width: int, keys: float) -> float:
        return 6 * self.heads * self.width_of_head(width) * self.width_of_value(width)

    def cost(self) -> str:
        return "6 H d e"


class DeltaNetModule(RecurrentModule):
    def __init__(self, spec, dims, rngs):
        super().__init__(spec, dims, rngs)
        self.beta = Linear(dims.width, spec.heads, rngs=rngs, bias=False, dtype=dims.dtype)

    def placed(self, x_BHTd, context):
        x_BHTd = x_BHTd.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(x_BHTd * x_BHTd, axis=-1, keepdims=True) + 1e-6)
        return self.rotated(x_BHTd / length, context)

    def recur(self, starts, query_BHTd, key_BHTd, value_BHTe, x_BTD, context, state):
        beta_BHT1 = self.heads(jax.nn.sigmoid(self.beta(x_BTD, "float32")))
        query_BHTd = query_BHTd * query_BHTd.shape[-1] ** -0.5
        none, chunk = self.log_decay(x_BTD), self.spec.chunk
        return delta_rule(starts, query_BHTd, key_BHTd, value_BHTe, beta_BHT1, none, state, chunk)
