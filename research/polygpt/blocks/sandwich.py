"""The sandwich block: a norm before and after each residual branch."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from polygpt.attention.contract import Context
from polygpt.blocks.block import BlockSpec, Branches, Parts
from polygpt.nn.dropout import dropout
from polygpt.nn.losses import Losses
from polygpt.sharding import RESIDUAL, constrain


@dataclasses.dataclass(frozen=True)
class Sandwich(BlockSpec):
    """x + norm(f(norm(x))) for each branch f: CogView (2105.13290), section 2.4, Gemma 2 (2408.00118), section 2."""

    in_order = False

    def build(self, parts: Parts, rngs: nnx.Rngs) -> "SandwichBlock":
        return SandwichBlock(parts, rngs)


class SandwichBlock(Branches):
    """Attention, then a feed-forward layer, each between two norms."""

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        super().__init__(parts, rngs)
        self.mlp_norm = parts.norm.build(parts.dims.width)
        self.attention_output_norm = parts.norm.build(parts.dims.width)
        self.mlp_output_norm = parts.norm.build(parts.dims.width)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """[B, T, D] -> ([B, T, D], cache, losses of a routed layer). `key=None` disables dropout."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache)
        y_BTD = context.record("attention", y_BTD)
        x_BTD = x_BTD + dropout(self.attention_output_norm(y_BTD), self.dropout, attention_key)
        y_BTD, losses = self._mlp(self.mlp_norm(constrain(x_BTD, *RESIDUAL)), context)
        x_BTD = x_BTD + dropout(self.mlp_output_norm(y_BTD), self.dropout, mlp_key)
        return constrain(x_BTD, *RESIDUAL), cache, losses

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> jax.Array:
        """Attention weights of the chosen queries, float32 [B, H, R, T]; `chosen_R=None` selects all queries."""
        return self.attention.weights(self.attention_norm(x_BTD), context, chosen_R)
