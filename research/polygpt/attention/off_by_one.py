"""Softmax with one more term in its denominator, so that a head may attend to nothing."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.kernels import reference
from polygpt.attention.multi_head import MultiHead, MultiHeadModule


@dataclasses.dataclass(frozen=True)
class SoftmaxOffByOne(MultiHead):
    """Softmax with one more term in its denominator. Miller, Attention Is Off By One (evanmiller.org, 2023), softmax1.

    exp(s_j) / (exp(b) + sum_k exp(s_k)) with b = 0; with `learned`, b is a number a head: the sinks of gpt-oss (model
    card, 2508.10925, section on attention). The softmax of the backend is multiplied by sigmoid(lse - b), the share of
    the sum that is not the extra term: every backend has it.
    """

    paper = "Miller, 2023, evanmiller.org/attention-is-off-by-one.html"

    learned: bool = False
    """Whether the extra term is learned, a number a head that starts at 0."""

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return SoftmaxOffByOneModule(self, dims, rngs)


class SoftmaxOffByOneModule(MultiHeadModule):
    def __init__(self, spec: SoftmaxOffByOne, dims: Dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        self.sink = nnx.Param(jnp.zeros(spec.heads)) if spec.learned else None

    def attend(self, rule, operands):
        y_BHTe, lse_BHT = super().attend(rule, operands)
        return (y_BHTe * self._share(lse_BHT)).astype(y_BHTe.dtype), lse_BHT

    def weigh(self, rule, operands):
        return super().weigh(rule, operands) * self._share(reference.attend(rule, operands)[1])

    def _share(self, lse_BHT):
        """What the extra term leaves to the keys, [B, H, T, 1]."""
        sink = 0.0 if self.sink is None else self.sink[...][None, :, None]
        return jax.nn.sigmoid(lse_BHT - sink)[..., None]
