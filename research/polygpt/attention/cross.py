"""Gated cross-attention: text looks at the embeddings of the media that came before it."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.masks import Causal, KeyModality, Mask, QueryModality
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.sequence import TEXT


@dataclasses.dataclass(frozen=True)
class GatedCross(MultiHead):
    """Text looks at media, through a tanh gate. Alayrac et al., Flamingo (2204.14198), section 3.1.2 and Figure 4.

    tanh(alpha) * attention(text, media). Keys and values are made of what the stack of blocks was given, the embeddings
    themselves, whatever the layer's depth. Text positions see the media positions of their own example before them
    (Flamingo: of the last item alone); the output is zero where there are none, and at media positions.
    """

    paper = "2204.14198"

    alpha: float = 0.0
    """Where alpha starts: at 0 the layer has no effect at first, as in the paper."""

    def validate(self):
        super().validate()
        self.require(not self.bias, "bias", "false: without media before it a position is to get zeros")

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
