"""Retention: linear attention with a fixed decay per head."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.recurrent import Recurrent, RecurrentModule
from polygpt.nn.norms import LayerNorm, Norm


@dataclasses.dataclass(frozen=True)
class Retention(Recurrent):
    """S_t = gamma S_{t-1} + k_t v_t^T, gamma_h = 1 - 2^(-5 - h), normalised per head and gated by swish.

    Sun et al., RetNet (2307.08621): eq. 5 and 6, chunks eq. 7, heads, norm and gate eq. 8. The stack's position
    encoding, `Rope`, rotates queries and keys; it is the paper's e^(i n theta). All heads share the affine parameters
    of the group norm. The paper's models use a `value_width` of twice the `head_width` and a smaller MLP in return.
    """

    paper = "2307.08621"

    norm: Norm | None = LayerNorm()
    """Normalisation of each head's output: the paper's group norm."""
    gate: bool = True
    """Whether to multiply the output by silu of another projection of the input."""

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return RetentionModule(self, dims, rngs)


class RetentionModule(RecurrentModule):
    def log_decay(self, x_BTD):
        B, T, _ = x_BTD.shape
        log_gamma_H = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.spec.heads))))
        return jnp.broadcast_to(log_gamma_H[None, :, None, None], (B, self.spec.heads, T, 1))
