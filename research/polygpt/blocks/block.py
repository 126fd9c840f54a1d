"""The transformer block: attention and a feed-forward layer, each normalised before and added after."""

from typing import Any

import jax
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.nn.dropout import dropout
from polygpt.nn.losses import Losses
from polygpt.nn.mlp import FeedForward
from polygpt.nn.norms import Norm
from polygpt.sharding import RESIDUAL, constrain


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm form. Xiong et al. (2002.04745), Figure 1b."""

    def __init__(self, attention: Attention, mlp: FeedForward, norm: Norm, dropout: float, dims: Dims, rngs: nnx.Rngs):
        self.dropout, self.routed = dropout, mlp.routed
        self.attention_norm = norm.build(dims.width)
        self.attention = attention.build(dims, rngs)
        self.mlp_norm = norm.build(dims.width)
        self.mlp = mlp.build(dims.width, rngs=rngs, dtype=dims.dtype, output_scale=dims.output_scale)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """[B, T, D] -> ([B, T, D], cache, losses of a routed layer). Without a key there is no dropout."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache)
        x_BTD = constrain(x_BTD + dropout(y_BTD, self.dropout, attention_key), *RESIDUAL)
        normed_BTD = self.mlp_norm(x_BTD)
        y_BTD, losses = self.mlp(normed_BTD, context) if self.routed else (self.mlp(normed_BTD), {})
        return constrain(x_BTD + dropout(y_BTD, self.dropout, mlp_key), *RESIDUAL), cache, losses

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> jax.Array:
        """The attention weights of the chosen queries of this block, float32 [B, H, R, T]; None means all."""
        return self.attention.weights(self.attention_norm(x_BTD), context, chosen_R)
