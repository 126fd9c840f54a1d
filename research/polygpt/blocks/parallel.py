"""The parallel block: attention and the feed-forward layer read the same input."""

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
class Parallel(BlockSpec):
    """x + attention(norm(x)) + mlp(norm(x)): GPT-J (Wang and Komatsuzaki, 2021), PaLM (2204.02311), section 2."""

    in_order = False

    shared_norm: bool = True
    """Whether both branches read the output of one norm; false gives each its own: GPT-NeoX (2204.06745), section 2.1.
    """

    def build(self, parts: Parts, rngs: nnx.Rngs) -> "ParallelBlock":
        return ParallelBlock(parts, self.shared_norm, rngs)


class ParallelBlock(Branches):
    """Both branches at once; a shared norm is called `attention_norm`."""

    def __init__(self, parts: Parts, shared_norm: bool, rngs: nnx.Rngs):
        super().__init__(parts, rngs)
        self.mlp_norm = None if shared_norm else parts.norm.build(parts.dims.width)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """[B, T, D] -> ([B, T, D], cache, losses of a routed layer). `key=None` disables dropout."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        input_BTD = self.attention_norm(x_BTD)
        attended_BTD, cache = self.attention(input_BTD, context, cache)
        attended_BTD = context.record("attention", attended_BTD)
        y_BTD, losses = self._mlp(input_BTD if self.mlp_norm is None else self.mlp_norm(x_BTD), context)
        x_BTD = x_BTD + dropout(attended_BTD, self.dropout, attention_key) + dropout(y_BTD, self.dropout, mlp_key)
        return constrain(x_BTD, *RESIDUAL), cache, losses

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> jax.Array:
        """Attention weights of the chosen queries, float32 [B, H, R, T]; `chosen_R=None` selects all queries."""
        return self.attention.weights(self.attention_norm(x_BTD), context, chosen_R)
