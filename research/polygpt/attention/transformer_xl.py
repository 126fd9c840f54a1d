"""Transformer-XL: segment-level recurrence and relative positions."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Attention, Dims
from polygpt.attention.masks import Blockwise, Mask
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.nn.linear import Linear
from polygpt.nn.positions import NoPosition, Position


@dataclasses.dataclass(frozen=True)
class TransformerXL(MultiHead):
    """Recurrence over pieces, and relative positions. Dai et al., Transformer-XL (1901.02860), sections 3.2 and 3.3.

    An example is divided into pieces: a position sees its own piece and the previous one, without gradients into the
    latter's activations. Scores are (q + u) k^T + (q + v) (W R_{i-j})^T, where R_n are sines and cosines of n. By the
    angle difference identities this equals an inner product of a longer query and a longer key, so every backend
    computes it, without shifting. With stopped gradients, the two pieces are separate backend calls, combined by their
    softmax sums. A bidirectional span also sees its own positions in the next piece.
    """

    paper = "1901.02860"
    in_order = MultiHead.in_order

    position: Position | None = NoPosition()
    """A position encoding in addition to the relative one of this layer; null for that of the stack."""
    piece: int = 32
    """Positions per piece."""
    detach: bool = True
    """Whether to stop gradients into the previous piece, as in the paper."""
    relative_width: int | None = None
    """Number of channels of R, a sine and a cosine per wavelength; null for the model width, as in the paper."""

    def validate(self):
        super().validate()
        self.require(self.piece >= 1, "piece", "at least 1")
        relative = self.relative_width
        self.require(relative is None or relative >= 2 and relative % 2 == 0, "relative_width", "even, 2 or more")

    def mask(self, mask: Mask) -> Mask:
        return super().mask(mask) & Blockwise(self.piece, around=1)

    def differentiable(self) -> Attention:
        return self.replace(detach=False)

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return TransformerXLModule(self, dims, rngs)

    def channels(self, width: int) -> int:
        """The number of channels of R at model width `width`."""
        if self.relative_width is None:
            self.require(width % 2 == 0, "relative_width", f"set if the model width, {width}, is odd")
        return self.relative_width or width

    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in super().backends() if name != "library")  # queries are wider than values

    def score_flops(self, width: int, keys: float) -> float:
        pair = 4 * self.width_of_head(width) + 2 * self.channels(width)
        return self.heads * pair * min(keys, 2 * self.piece)

    def cost(self) -> str:
        return "H (4 d + 2 D) min(S, 2 piece)"


class TransformerXLModule(MultiHeadModule):
    def project(self, rngs):
        super().project(rngs)
        spec, H, d = self.spec, self.spec.heads, self.spec.width_of_head(self.dims.width)
        self.relative = Linear(spec.channels(self.dims.width), H * d, rngs=rngs, bias=False, dtype=self.dims.dtype)
        self.u, self.v = (nnx.Param(jax.random.normal(rngs.params(), (H, d)) * 0.02, decays=False) for _ in range(2))

    def __call__(self, x_BTD, context, cache=None):
        if not self.spec.detach or cache is not None:
            return super().__call__(x_BTD, context, cache)
        # Gradients reach the projections of the previous piece but not their input: SG(h) in the paper's equations.
        own, past = self.remembered(x_BTD, context), self.remembered(jax.lax.stop_gradient(x_BTD), context)
        piece = Blockwise(self.spec.piece)
        y_BHTe, lse_BHT = self._attend_to(own, piece, x_BTD, context)
        before_BHTe, before_BHT = self._attend_to(past, ~piece, x_BTD, context)
        share_BHT1 = jax.nn.sigmoid(lse_BHT - before_BHT)[..., None]
        joined_BHTe = (y_BHTe * share_BHT1 + before_BHTe * (1 - share_BHT1)).astype(y_BHTe.dtype)
        return self.mixed(joined_BHTe, jnp.logaddexp(lse_BHT, before_BHT), x_BTD, context), None

    def queries(self, x_BTD, context):
        query_BHTd = super().queries(x_BTD, context)
        u, v = (bias[...].astype(query_BHTd.dtype)[None, :, None, :] for bias in (self.u, self.v))
        W_RHd = self.relative.kernel[...].astype(query_BHTd.dtype).reshape(-1, *self.u.shape)
        a, b = jnp.split(jnp.einsum("bhtd,rhd->bhtr", query_BHTd + v, W_RHd), 2, axis=-1)
        sin, cos = self._waves(context.query.position)
        # a sin(i - j) + b cos(i - j) = (a sin i + b cos i) cos j + (b sin i - a cos i) sin j
        parts = query_BHTd + u, a * sin + b * cos, b * sin - a * cos
        return jnp.concatenate(parts, axis=-1)

    def operands(self, x_BTD, context, seen, key):
        operands = super().operands(x_BTD, context, seen, key)
        sin, cos = self._waves(key.position)
        waves_BKSR = jnp.concatenate([cos, sin], axis=-1)
        waves_BKSR = jnp.broadcast_to(waves_BKSR, (*operands.key_BKSd.shape[:3], waves_BKSR.shape[-1]))
        return dataclasses.replace(operands, key_BKSd=jnp.concatenate([operands.key_BKSd, waves_BKSR], axis=-1))

    def _attend_to(self, seen, part, x_BTD, context):
        """Attention to the part of the `seen` positions selected by the mask `part`."""
        rule = self.spec.rule(context.mask, self.dims)
        rule = dataclasses.replace(rule, mask=rule.mask & part)
        return self.attend(rule, self.operands(x_BTD, context, seen, context.key))

    def _waves(self, position_BT):
        """Sines and cosines of positions, [B, 1, T, R / 2] each. Vaswani et al. (1706.03762), section 3.5."""
        half = self.spec.channels(self.dims.width) // 2
        frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = position_BT[:, None, :, None].astype(jnp.float32) * frequency[None, None, None, :]
        return jnp.sin(angle).astype(self.dims.dtype), jnp.cos(angle).astype(self.dims.dtype)
