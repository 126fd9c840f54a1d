"""Multi-head attention (Vaswani et al., 1706.03762, section 3.2) with multi-query (Shazeer, 1911.02150) and
grouped-query (Ainslie et al., 2305.13245) forms: as many key and value heads as query heads, one, or some."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.attention.kernels.reference import attend, attention_weights
from polygpt.attention.masks import Mask, allowed
from polygpt.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class MultiHead(Attention):
    """Softmax attention with H query heads and K key and value heads."""

    heads: int = 4
    """H, the number of query heads."""
    kv_heads: int | None = None
    """K, the number of key and value heads: a divisor of `heads`; null means as many as `heads`, 1 is multi-query."""
    head_width: int | None = None
    """d, the width of a head; null means the model width over `heads`."""
    bias: bool = False
    """Whether the projections have a bias."""
    key_bias: bool | None = None
    """Whether the key projection has a bias; null means as `bias` (softmax does not see it: Whisper leaves it out)."""

    def validate(self):
        self.require(self.heads >= 1, "heads", "at least 1")
        kv_heads = self.key_heads()
        self.require(kv_heads >= 1 and self.heads % kv_heads == 0, "kv_heads", f"a divisor of heads ({self.heads})")

    def key_heads(self) -> int:
        """K."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def width_of_head(self, width: int) -> int:
        """d at the model width `width`; SpecError where the heads do not divide it."""
        if self.head_width is None:
            self.require(width % self.heads == 0, "heads", f"a divisor of the model width ({width}), or set head_width")
        return self.head_width or width // self.heads

    def mask(self, mask: Mask) -> Mask:
        """What queries see of what the model's own `mask` lets them see. A variant narrows it: `mask & Window(64)`."""
        return mask

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return _MultiHead(self, dims, rngs)

    def init_cache(self, dims: Dims, rows: int, size: int) -> Any:
        shape = (rows, self.key_heads(), size, self.width_of_head(dims.width))
        return {"key": jnp.zeros(shape, dims.dtype), "value": jnp.zeros(shape, dims.dtype)}

    def score_flops(self, width: int, keys: float) -> float:
        return 4 * self.heads * self.width_of_head(width) * keys


class _MultiHead(nnx.Module):
    def __init__(self, spec: MultiHead, dims: Dims, rngs: nnx.Rngs):
        self.spec, self.dims = spec, dims
        d = spec.width_of_head(dims.width)
        key_bias = spec.bias if spec.key_bias is None else spec.key_bias
        options = {"rngs": rngs, "dtype": dims.dtype}
        self.query = Linear(dims.width, spec.heads * d, bias=spec.bias, **options)
        self.key = Linear(dims.width, spec.key_heads() * d, bias=key_bias, **options)
        self.value = Linear(dims.width, spec.key_heads() * d, bias=spec.bias, **options)
        self.output = Linear(spec.heads * d, dims.width, bias=spec.bias, scale=dims.output_scale, **options)

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        query_BHTd, key_BKSd = self._query_and_key(x_BTD, context)
        value_BKSd = self._heads(self.value(x_BTD))
        if cache is not None:
            key_BKSd = jax.lax.dynamic_update_slice_in_dim(cache["key"], key_BKSd, context.cursor, axis=2)
            value_BKSd = jax.lax.dynamic_update_slice_in_dim(cache["value"], value_BKSd, context.cursor, axis=2)
            cache = {"key": key_BKSd, "value": value_BKSd}
        y_BHTd = attend(query_BHTd, key_BKSd, value_BKSd, self._allowed(context))
        B, H, T, d = y_BHTd.shape
        return self.output(y_BHTd.transpose(0, 2, 1, 3).reshape(B, T, H * d)), cache

    def weights(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """The attention weights, float32 [B, H, T, T]."""
        query_BHTd, key_BKSd = self._query_and_key(x_BTD, context)
        return attention_weights(query_BHTd, key_BKSd, self._allowed(context))

    def _allowed(self, context: Context) -> jax.Array:
        return allowed(self.spec.mask(context.mask), context.query, context.key)

    def _query_and_key(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        rotate, position_BT = self.dims.position.rotate, context.query.position
        return (
            rotate(self._heads(self.query(x_BTD)), position_BT),
            rotate(self._heads(self.key(x_BTD)), position_BT),
        )

    def _heads(self, x_BTE: jax.Array) -> jax.Array:
        d = self.spec.width_of_head(self.dims.width)
        return x_BTE.reshape(*x_BTE.shape[:2], -1, d).transpose(0, 2, 1, 3)
