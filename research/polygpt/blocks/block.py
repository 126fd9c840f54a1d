"""The transformer block: attention and a feed-forward layer as residual branches, with pre- or post-normalisation."""

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
"""Whether to normalise the input of a residual branch, or the sum after adding its output."""


class Block(nnx.Module):
    """Attention, then a feed-forward layer. For each branch f, pre-norm is x + f(norm(x)), post-norm norm(x + f(x)).

    Xiong et al. (2002.04745), Figures 1b and 1a; Vaswani et al. (1706.03762) use post-norm.
    """

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
        """[B, T, D] -> ([B, T, D], cache, losses of a routed layer). `key=None` disables dropout."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self._branch_input(x_BTD, self.attention_norm), context, cache)
        x_BTD = self._add_branch(x_BTD, y_BTD, self.attention_norm, attention_key)
        input_BTD = self._branch_input(x_BTD, self.mlp_norm)
        y_BTD, losses = self.mlp(input_BTD, context) if self.routed else (self.mlp(input_BTD), {})
        return self._add_branch(x_BTD, y_BTD, self.mlp_norm, mlp_key), cache, losses

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> jax.Array:
        """Attention weights of the chosen queries, float32 [B, H, R, T]; `chosen_R=None` selects all queries."""
        return self.attention.weights(self._branch_input(x_BTD, self.attention_norm), context, chosen_R)

    def _branch_input(self, x_BTD, norm):
        return norm(x_BTD) if self.pre else x_BTD

    def _add_branch(self, x_BTD, y_BTD, norm, key):
        """Adds a branch's output to the residual stream."""
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, key)
        return constrain(x_BTD if self.pre else norm(x_BTD), *RESIDUAL)
