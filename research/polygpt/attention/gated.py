"""Attention with a gated output."""

import dataclasses
from typing import Literal

import jax
from flax import nnx

from polygpt.attention.contract import QUERY, Dims
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class GatedOutput(MultiHead):
    """A sigmoid gate after attention. Qiu et al., Gated Attention for Large Language Models (2505.06708), section 2.2.

    softmax(q k^T) v * sigmoid(x W), followed by the output projection: position G1 in the paper, which the authors
    recommend. The gate is computed from the layer's (normalised) input.
    """

    paper = "2505.06708"
    in_order = MultiHead.in_order

    gate: Literal["element", "head"] = "element"
    """One gate per channel, or one per head."""

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return GatedOutputModule(self, dims, rngs)


class GatedOutputModule(MultiHeadModule):
    def project(self, rngs):
        super().project(rngs)
        gates = 1 if self.spec.gate == "head" else self.spec.width_of_head(self.dims.width)
        options = {"rngs": rngs, "bias": False, "dtype": self.dims.dtype, "axes": QUERY}
        self.gate = Linear(self.dims.width, self.spec.heads * gates, **options)

    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        B, T, _ = x_BTD.shape
        gate_BHTe = self.gate(x_BTD).reshape(B, T, self.spec.heads, -1).transpose(0, 2, 1, 3)
        return super().mixed(y_BHTe * jax.nn.sigmoid(gate_BHTe), lse_BHT, x_BTD, context)
