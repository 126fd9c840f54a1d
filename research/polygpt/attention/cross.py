"""Gated cross-attention: text attends to the embeddings of earlier media."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.masks import Causal, KeyModality, Mask, QueryModality
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.sequence import TEXT


@dataclasses.dataclass(frozen=True)
class GatedCross(MultiHead):
    """Text attends to media through a tanh gate. Alayrac et al., Flamingo (2204.14198), section 3.1.2 and Figure 4.

    tanh(alpha) * attention(text, media). At every depth, keys and values are computed from the input of the stack, the
    embeddings themselves. Text positions see the earlier media positions of their own example (in Flamingo: only those
    of the last item). The output is zero if there are none, and at media positions.
    """

    paper = "2204.14198"
    in_order = MultiHead.in_order

    alpha: float = 0.0
    """Initial value of alpha; at 0 the layer initially has no effect, as in the paper."""

    def validate(self):
        super().validate()
        self.require(not self.bias, "bias", "false: a position without earlier media must get zeros")

    def mask(self, mask: Mask) -> Mask:
        return super().mask(mask) & Causal() & QueryModality(TEXT) & ~KeyModality(TEXT)

    def sees_ahead(self) -> bool:
        return False

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return GatedCrossModule(self, dims, rngs)


class GatedCrossModule(MultiHeadModule):
    def __init__(self, spec: GatedCross, dims: Dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        self.alpha = nnx.Param(jnp.asarray(spec.alpha, jnp.float32))

    def remembered(self, x_BTD, context):
        return super().remembered(x_BTD if context.inputs_BTD is None else context.inputs_BTD, context)

    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        y_BTD = super().mixed(y_BHTe, lse_BHT, x_BTD, context)
        return (y_BTD * jnp.tanh(self.alpha[...])).astype(y_BTD.dtype)
