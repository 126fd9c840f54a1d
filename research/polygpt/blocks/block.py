"""The transformer block: attention and a feed-forward layer, each a residual branch, and where they are normalised."""

from typing import Any, Literal

import jax
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.nn.dropout import dropout
from polygpt.nn.losses import Losses
from polygpt.nn.mlp import FeedForward
from polygpt.nn.norms import Norm
from polygpt.sharding import RESIDUAL, constrain

NormPlacement = Literal["pre", "post"]
"""Where norms stand: before what a residual branch computes, or after it has been added."""


class Block(nnx.Module):
    """First attention, then the feed-forward layer f: x + f(norm(x)) is the pre-norm form, norm(x + f(x)) the post-norm
    form. Xiong et al. (2002.04745), Figure 1b and 1a; post-norm is that of Vaswani et al. (1706.03762)."""

    def __init__(
        self,
        attention: Attention,
        mlp: FeedForward,
        norm: Norm,
        norm_placement: NormPlacement,
        dropout: float,
        dims: Dims,
        rngs: nnx.Rngs,
    ):
        self.dropout, self.routed, self.pre = dropout, mlp.routed, norm_placement == "pre"
        self.attention_norm = norm.build(dims.width)
        self.attention = attention.build(dims, rngs)
        self.mlp_norm = norm.build(dims.width)
        self.mlp = mlp.build(dims.width, rngs=rngs, dtype=dims.dtype, output_scale=dims.output_scale)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """[B, T, D] -> ([B, T, D], cache, losses of a routed layer). Without a key there is no dropout."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self._entering(x_BTD, self.attention_norm), context, cache)
        x_BTD = self._added(x_BTD, y_BTD, self.attention_norm, attention_key)
        entering_BTD = self._entering(x_BTD, self.mlp_norm)
        y_BTD, losses = self.mlp(entering_BTD, context) if self.routed else (self.mlp(entering_BTD), {})
        return self._added(x_BTD, y_BTD, self.mlp_norm, mlp_key), cache, losses

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> jax.Array:
        """The attention weights of the chosen queries of this block, float32 [B, H, R, T]; None means all."""
        return self.attention.weights(self._entering(x_BTD, self.attention_norm), context, chosen_R)

    def _entering(self, x_BTD, norm):
        """What a branch reads of the stream."""
        return norm(x_BTD) if self.pre else x_BTD

    def _added(self, x_BTD, y_BTD, norm, key):
        """The stream with what a branch gives."""
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, key)
        return constrain(x_BTD if self.pre else norm(x_BTD), *RESIDUAL)
