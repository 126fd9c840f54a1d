"""Gated linear attention: data-dependent decay per key channel."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.recurrent import Recurrent, RecurrentModule
from polygpt.nn.linear import Linear
from polygpt.nn.norms import LayerNorm, Norm


@dataclasses.dataclass(frozen=True)
class GatedLinear(Recurrent):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/16). Yang et al. (2312.06635).

    Recurrence in section 4.2, layer in 4.4: y_t = (swish(x_t W_r) * norm(S_t^T q_t)) W_o. Instead of the paper's
    secondary chunking, which avoids dividing by small decays, `kernels/recurrence.py` halves blocks recursively with
    matrix products. The decay encodes positions; there is no rotary encoding.
    """

    paper = "2312.06635"

    rank: int = 16
    """The rank of the projection to the decay."""
    temperature: float = 16.0
    """The decay is the sigmoid to the power of 1 / temperature; large values make the state decay slowly."""
    rotates: bool = False
    """Whether the position encoding rotates queries and keys."""
    norm: Norm | None = LayerNorm()
    """Normalisation of each head's output."""
    gate: bool = True
    """Whether to multiply the output by silu of another projection of the input."""

    def validate(self):
        super().validate()
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.temperature > 0, "temperature", "above 0")

    def width_of_head(self, width: int) -> int:
        """d: by default half the model width divided by `heads`, as in the paper's models."""
        return self.head_width or self.part(-(-width // 2), "head_width")

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return GatedLinearModule(self, dims, rngs)


class GatedLinearModule(RecurrentModule):
    def __init__(self, spec, dims, rngs):
        super().__init__(spec, dims, rngs)
        keys = spec.heads * spec.width_of_head(dims.width)
        self.decay_down = Linear(dims.width, spec.rank, rngs=rngs, bias=False, dtype=dims.dtype)
        self.decay_up = Linear(spec.rank, keys, rngs=rngs, bias=True, dtype="float32")

    def log_decay(self, x_BTD):
        logits_BTE = self.decay_up(self.decay_down(x_BTD, "float32"))
        return self.heads(jax.nn.log_sigmoid(logits_BTE) / jnp.float32(self.spec.temperature))
