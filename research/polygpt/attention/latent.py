"""Multi-head latent attention: keys and values of all heads are computed from one small cached latent vector."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import OUTPUT, QUERY, Dims
from polygpt.attention.kernels import reference
from polygpt.attention.kernels.problem import Operands
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.errors import SpecError
from polygpt.nn.linear import Linear
from polygpt.nn.norms import RMSNorm
from polygpt.nn.rotary import YaRN


@dataclasses.dataclass(frozen=True)
class MultiHeadLatent(MultiHead):
    """Low-rank keys and values plus one rotary key. DeepSeek-V2 (2405.04434), section 2.1, eq. 9 to 19.

    The cache stores, per position, a latent of width R and a key of width r that is shared by all heads and alone
    encodes the position. The expanded form computes keys and values of all heads from the latents. The absorbed form,
    with the same result, multiplies queries and outputs by those matrices and attends to the latents as one head.
    Biases are placed as in the authors' code, on the maps from and to the model width.
    """

    paper = "2405.04434"
    in_order = MultiHead.in_order

    kv_rank: int | None = None
    """R, the width of the latent; null for 4 d, as in the paper."""
    q_rank: int | None = None
    """The width of a query latent; null to project queries directly (DeepSeek-V2-Lite)."""
    rope_width: int | None = None
    """r, the width of the shared key that encodes the position; null for d/2, as in the paper."""
    form: Literal["auto", "expanded", "absorbed"] = "auto"
    """Which form to use; auto is the one with fewer FLOPs: expanded for whole rows, absorbed for decode steps."""

    def validate(self):
        super().validate()
        for name in ("kv_heads", "qk_norm", "key_bias"):
            self.require(getattr(self, name) is None, name, "null: keys are computed from the normalised latent")
        for name in ("kv_rank", "q_rank", "rope_width"):
            self.require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")

    def rank(self, width: int) -> int:
        """R at model width `width`."""
        return self.kv_rank or 4 * self.width_of_head(width)

    def width_of_rope(self, width: int) -> int:
        """r at model width `width`, even."""
        return self.rope_width or max(2, self.width_of_head(width) // 4 * 2)

    def width_of_query(self, width: int) -> int:
        return self.width_of_head(width) + self.width_of_rope(width)

    def absorbs(self, width: int, queries: int, keys: int) -> bool:
        """Whether to use the absorbed form for this many queries and keys."""
        d, r, R = self.width_of_head(width), self.width_of_rope(width), self.rank(width)
        absorbed = queries * (keys * (2 * R + r) + 2 * R * d)
        expanded = keys * (queries * (2 * d + r) + 2 * R * d)
        return self.form == "absorbed" or self.form == "auto" and absorbed < expanded

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return MultiHeadLatentModule(self, dims, rngs)

    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in super().backends() if name != "library")  # queries are wider than values

    def score_flops(self, width: int, keys: float) -> float:
        return 2 * self.heads * (self.width_of_query(width) + self.width_of_head(width)) * keys

    def cost(self) -> str:
        return "2 H (2 d + r) S"


class MultiHeadLatentModule(MultiHeadModule):
    def project(self, rngs):
        spec, D = self.spec, self.dims.width
        if isinstance(getattr(spec.encoding(self.dims), "scaling", None), YaRN):
            raise SpecError("MultiHeadLatent: YaRN would sharpen only the rotary part of scores: use NTK scaling")
        H, d, r, R = spec.heads, spec.width_of_head(D), spec.width_of_rope(D), spec.rank(D)
        options = {"rngs": rngs, "dtype": self.dims.dtype}
        self.query_latent = spec.q_rank and Linear(D, spec.q_rank, bias=spec.bias, **options)
        self.query_latent_norm = spec.q_rank and RMSNorm().build(spec.q_rank)
        self.query = Linear(spec.q_rank or D, H * (d + r), bias=False, axes=QUERY, **options)
        self.latent = Linear(D, R, bias=spec.bias, **options)
        self.latent_norm = RMSNorm().build(R)
        self.rope_key = Linear(D, r, bias=spec.bias, **options)
        self.key, self.value = (Linear(R, H * d, bias=False, axes=QUERY, **options) for _ in range(2))
        scale = self.dims.output_scale
        self.output = Linear(H * d, D, bias=spec.bias, scale=scale, axes=OUTPUT, **options)

    def queries(self, x_BTD, context):
        """[B, H, T, d + r]."""
        if self.query_latent is not None:
            x_BTD = self.query_latent_norm(self.query_latent(x_BTD))
        B, T, _ = x_BTD.shape
        query_BHTd = self.query(x_BTD).reshape(B, T, self.spec.heads, -1).transpose(0, 2, 1, 3)
        d = self.spec.width_of_head(self.dims.width)
        rotated = self._placed(query_BHTd[..., d:], None, context)
        return jnp.concatenate([query_BHTd[..., :d], rotated], axis=-1)

    def keys(self, x_BTD, context):
        """The shared key that encodes the position, [B, 1, T, r]."""
        return self._placed(self.rope_key(x_BTD)[:, None], None, context)

    def values(self, x_BTD, context):
        """The latent, [B, 1, T, R]."""
        return self.latent_norm(self.latent(x_BTD))[:, None]

    def attend(self, rule, operands):
        T, S = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2]
        if not self.spec.absorbs(self.dims.width, T, S):
            return super().attend(rule, self._expanded(operands))
        y_BHTR, lse_BHT = super().attend(rule, self._absorbed(operands))
        return jnp.einsum("bhtr,rhd->bhtd", y_BHTR, self._up(self.value)), lse_BHT

    def weigh(self, rule, operands):
        return reference.attention_weights(rule, self._expanded(operands))

    def _expanded(self, operands: Operands) -> Operands:
        """Keys and values of every head."""
        latent_BSR, H = operands.value_BKSe[:, 0], self.spec.heads
        rope_BHSr = jnp.broadcast_to(operands.key_BKSd, (len(latent_BSR), H, *operands.key_BKSd.shape[2:]))
        key_BHSd = jnp.concatenate([self.heads(self.key(latent_BSR)), rope_BHSr], axis=-1)
        return dataclasses.replace(operands, key_BKSd=key_BHSd, value_BKSe=self.heads(self.value(latent_BSR)))

    def _absorbed(self, operands: Operands) -> Operands:
        """The latents, with the shared key, as keys and values of one head."""
        d, latent_B1SR = self.spec.width_of_head(self.dims.width), operands.value_BKSe
        query_BHTd, rotated = operands.query_BHTd[..., :d], operands.query_BHTd[..., d:]
        query_BHTR = jnp.einsum("bhtd,rhd->bhtr", query_BHTd, self._up(self.key))
        return dataclasses.replace(
            operands,
            query_BHTd=jnp.concatenate([query_BHTR, rotated], axis=-1),
            key_BKSd=jnp.concatenate([latent_B1SR, operands.key_BKSd], axis=-1),
        )

    def _up(self, linear: Linear) -> jax.Array:
        """The map from latents to keys or values, [R, H, d]."""
        kernel = linear.kernel[...].astype(self.dims.dtype)
        return kernel.reshape(kernel.shape[0], self.spec.heads, -1)
