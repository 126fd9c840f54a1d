"""Softmax with an extra term in the denominator, so that a head can attend to nothing."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.kernels import reference
from polygpt.attention.multi_head import MultiHead, MultiHeadModule


@dataclasses.dataclass(frozen=True)
class SoftmaxOffByOne(MultiHead):
    """Softmax with an extra term in the denominator. Miller, Attention Is Off By One (evanmiller.org, 2023), softmax1.

    exp(s_j) / (exp(b) + sum_k exp(s_k)) with b = 0; with `learned`, b is one value per head: the sinks of gpt-oss
    (model card, 2508.10925, section on attention). Computed by multiplying the backend's softmax by sigmoid(lse - b),
    which works with every backend that computes lse in the same pass.
    """

    paper = "Miller, 2023, evanmiller.org/attention-is-off-by-one.html"
    in_order = MultiHead.in_order

    learned: bool = False
    """Whether to learn the extra term, one value per head, initialised to 0."""

    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in super().backends() if name != "library")  # it has no lse with a gradient

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return SoftmaxOffByOneModule(self, dims, rngs)


class SoftmaxOffByOneModule(MultiHeadModule):
    def __init__(self, spec: SoftmaxOffByOne, dims: Dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        self.sink = nnx.Param(jnp.zeros(spec.heads)) if spec.learned else None

    def attend(self, rule, operands):
        y_BHTe, lse_BHT = super().attend(dataclasses.replace(rule, lse=True), operands)
        return (y_BHTe * self._share(lse_BHT)).astype(y_BHTe.dtype), lse_BHT

    def weigh(self, rule, operands):
        weights_BHTS, lse_BHT = reference.weights_and_lse(rule, operands)
        return weights_BHTS * self._share(lse_BHT)

    def _share(self, lse_BHT):
        """The fraction of the denominator due to keys, [B, H, T, 1]."""
        sink = 0.0 if self.sink is None else self.sink[...][None, :, None]
        return jax.nn.sigmoid(lse_BHT - sink)[..., None]
