"""A stack of blocks: what the decoder and the media towers are made of."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.block import Block
from polygpt.nn.mlp import MLP, FeedForward
from polygpt.nn.norms import LayerNorm, Norm
from polygpt.nn.positions import NoPosition, Position
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class StackSpec(Spec):
    """A number of equal pre-norm blocks and a last normalisation."""

    width: int = 128
    """D, the model width."""
    depth: int = 4
    """L, the number of blocks."""
    attention: Attention = MultiHead()
    """The attention variant of every block."""
    mlp: FeedForward = MLP()
    """The feed-forward layer of every block."""
    norm: Norm = LayerNorm()
    """The normalisation before each half of a block and after the last block."""
    position: Position = NoPosition()
    """The position encoding."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings and of each residual branch, in training."""
    scan: bool = True
    """Compile one block and scan it over stacked parameters: quick to compile; on a CPU slower to run than `false`."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes anew: nothing, all but matrix products, or everything inside a block."""

    def validate(self):
        self.require(self.width >= 1, "width", "at least 1")
        self.require(self.depth >= 0, "depth", "at least 0")
        self.require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")

    def dims(self, dtype: str) -> Dims:
        """What the attention variant needs to know. Residual branches start at 1/sqrt(2 L): GPT-2, section 2.3."""
        return Dims(self.width, dtype, self.position, output_scale=(2 * max(self.depth, 1)) ** -0.5)

    def score_flops(self, keys: float) -> float:
        """FLOPs of all blocks' attention beside its matrices, for one position that sees `keys` keys."""
        return self.depth * self.attention.score_flops(self.width, keys)

    def init_cache(self, rows: int, size: int, dtype: str) -> Any:
        """Empty caches of all blocks for `size` positions, the axis of blocks first."""
        one = self.attention.init_cache(self.dims(dtype), rows, size)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.depth, *x.shape)), one)


class Stack(nnx.Module):
    """The module of a `StackSpec`. Parameters: `blocks/attention/...` [L, ...] if scanned, else `blocks/0/...`."""

    def __init__(self, spec: StackSpec, *, rngs: nnx.Rngs, dtype: str):
        self.spec, self.dtype = spec, dtype
        dims = spec.dims(dtype)

        def block(key):
            return Block(spec.attention, spec.mlp, spec.norm, spec.dropout, dims, nnx.Rngs(key))

        keys = jax.random.split(rngs.params(), max(spec.depth, 1))
        if spec.depth == 0:
            self.blocks = None
        elif spec.scan:
            self.blocks = nnx.vmap(block)(keys)
        else:
            self.blocks = nnx.List([block(key) for key in keys])
        self.norm = spec.norm.build(spec.width)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D] normalised, cache)."""

        def call(block, x_BTD, layer, cache):
            return block(x_BTD, context, cache, None if key is None else jax.random.fold_in(key, layer))

        x_BTD, cache = self._over_blocks(call, x_BTD, cache)
        return self.norm(x_BTD), cache

    def weights(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """The attention weights of every block, float32 [L, B, H, T, T]."""

        def call(block, x_BTD, layer, cache):
            return block(x_BTD, context)[0], block.weights(x_BTD, context)

        return self._over_blocks(call, x_BTD, None)[1]

    def _over_blocks(self, call, x_BTD, cache):
        """Threads x through `call(block, x, layer, cache of the layer) -> (x, output)`; the outputs come stacked."""
        if self.blocks is None:
            return x_BTD, cache
        layers = jnp.arange(self.spec.depth)
        x_BTD = x_BTD.astype(self.dtype)
        if not self.spec.scan:
            outputs = []
            for layer, block in enumerate(self.blocks):
                here = jax.tree.map(lambda leaf, layer=layer: leaf[layer], cache)
                x_BTD, output = self._remat(call, block)(x_BTD, layer, here)
                outputs.append(output)
            return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        graphdef, stacked = nnx.split(self.blocks)

        def body(x_BTD, inputs):
            params, layer, here = inputs
            return self._remat(call, nnx.merge(graphdef, params))(x_BTD, layer, here)

        return jax.lax.scan(body, x_BTD, (stacked, layers, cache))

    def _remat(self, call, block):
        if self.spec.remat == "none":
            return lambda *arguments: call(block, *arguments)
        policies = jax.checkpoint_policies
        policy = policies.nothing_saveable if self.spec.remat == "full" else policies.dots_saveable
        graphdef, params = nnx.split(block)

        def pure(params, *arguments):
            return call(nnx.merge(graphdef, params), *arguments)

        checkpointed = jax.checkpoint(pure, policy=policy, prevent_cse=not self.spec.scan)
        return lambda *arguments: checkpointed(params, *arguments)
