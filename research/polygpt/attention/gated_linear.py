"""Gated linear attention: each channel of a key has a decay that depends on the input."""

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

    Section 4.2 the recurrence, 4.4 the layer: y_t = (swish(x_t W_r) * norm(S_t^T q_t)) W_o. The paper's second level of
    chunks, for decays that cannot be divided by, is here the halving of `kernels/recurrence.py`, which is products of
    matrices down to single positions. Positions are in the decay: no encoding turns queries and keys.
    """

    paper = "2312.06635"

    rank: int = 16
    """The rank of the projection to the decay."""
    temperature: float = 16.0
    """The decay is the sigmoid to the power of one over this: large ones let the state live long."""
    rotates: bool = False
    """Whether the position encoding turns queries and keys."""
    norm: Norm | None = LayerNorm()
    """Normalisation of what each head has read."""
    gate: bool = True
    """Whether the output is multiplied by silu of one more projection of the input."""

    def validate(self):
        super().validate()
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.temperature > 0, "temperature", "above 0")

    def width_of_head(self, width: int) -> int:
        """d: null means half the model width over `heads`, as in the paper's models."""
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
