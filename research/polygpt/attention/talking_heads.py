"""Talking-heads attention: heads are mixed before and after the softmax."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Dims
from polygpt.attention.kernels import dispatch, reference
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.sharding import constrain

REASON = "talking heads mix the scores of all heads, which requires the materialised matrix"


@dataclasses.dataclass(frozen=True)
class TalkingHeads(MultiHead):
    """Heads are mixed before and after the softmax. Shazeer et al., Talking-Heads Attention (2003.02436), section 4.

    softmax(q k^T P) P' v. P and P' act on the head axis, are square, [H, H], and are initialised to the identity, which
    is multi-head attention. Score modifications apply before mixing, the mask after.
    """

    paper = "2003.02436"
    in_order = MultiHead.in_order

    def validate(self):
        super().validate()
        self.require(not self.strict or self.backend in ("auto", "reference"), "backend", f"reference: {REASON}")

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return TalkingHeadsModule(self, dims, rngs)

    def backends(self) -> tuple[str, ...]:
        return ("reference",)

    def score_flops(self, width: int, keys: float) -> float:
        return super().score_flops(width, keys) + 4 * self.heads**2 * keys

    def cost(self) -> str:
        return "4 H d S + 4 H^2 S"


class TalkingHeadsModule(MultiHeadModule):
    def __init__(self, spec: TalkingHeads, dims: Dims, rngs: nnx.Rngs):
        super().__init__(spec, dims, rngs)
        self.before, self.after = (nnx.Param(jnp.eye(spec.heads), decays=False) for _ in range(2))

    def attend(self, rule, operands):
        if self.spec.backend not in ("auto", "reference"):
            dispatch.warn_fallback("reference", self.spec.backend, REASON)
        weights_BHTS, lse_BHT = self._weights(rule, operands)
        return reference.weighted_values(weights_BHTS, operands.value_BKSe), lse_BHT

    def weigh(self, rule, operands):
        return self._weights(rule, operands)[0]

    def _weights(self, rule, operands):
        score_BHTS, visible_B1TS = reference.masked_scores(rule, operands)
        # Masked scores are huge negative numbers, which must not leak into other heads.
        score_BHTS = _mixed(jnp.where(visible_B1TS, score_BHTS, 0), self.before[...])
        score_BHTS = jnp.where(visible_B1TS, score_BHTS, reference.LOWEST)
        weights_BHTS = _mixed(reference.normalized(rule, score_BHTS, visible_B1TS), self.after[...])
        return weights_BHTS, jax.nn.logsumexp(score_BHTS, axis=-1)


def _mixed(x_BHTS: jax.Array, mixture_HG: jax.Array) -> jax.Array:
    """Mixes heads H into G: [B, G, T, S].

    The sharding is constrained before and after, because XLA's own choice for the gradient of the mixture, a product
    summed over three axes, is wrong if rows and positions are split (jax 0.10.2 and 0.12).
    """
    x_BHTS = constrain(x_BHTS, "batch", None, "positions", None)
    return constrain(jnp.einsum("bhts,hg->bgts", x_BHTS, mixture_HG), "batch", None, "positions", None)
