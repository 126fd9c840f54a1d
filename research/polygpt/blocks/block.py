"""The transformer block: attention and a feed-forward layer as residual branches. How they are joined is a spec."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.nn.dropout import dropout
from polygpt.nn.losses import Losses
from polygpt.nn.mlp import FeedForward
from polygpt.nn.norms import Norm
from polygpt.sharding import RESIDUAL, constrain
from polygpt.spec import Spec

NormPlacement = Literal["pre", "post"]
"""Whether to normalise the input of a residual branch, or the sum after adding its output."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a block is built from.

    Attributes:
        attention: the attention variant.
        mlp: the feed-forward layer.
        norm: the normalisation.
        norm_placement: that of the stack.
        dropout: probability of dropping an element of a branch's output, in training.
        dims: the dimensions that attention needs.
    """

    attention: Attention
    mlp: FeedForward
    norm: Norm
    norm_placement: NormPlacement
    dropout: float
    dims: Dims


@dataclasses.dataclass(frozen=True)
class BlockSpec(Spec):
    """How attention and the feed-forward layer are joined. A new form derives from this class and needs no other edits.

    `build` returns a module with the call of `Block`. Where attention can return weights, it has `weights` too. What
    others may capture inside it is passed through `Context.record`.
    """

    norm_placements: ClassVar[tuple[NormPlacement, ...]] = ("pre",)
    """The values of a stack's `norm_placement` that it supports."""
    branches: ClassVar[int] = 2
    """Number of residual branches."""
    reads_source: ClassVar[bool] = False
    """Whether it attends to the output of an encoder, `Context.source`."""
    in_order: ClassVar[bool] = True
    """Whether it reads neighbouring positions in its input itself, besides its attention and its feed-forward layer. A
    class that defines `build` declares it again."""

    def build(self, parts: Parts, rngs: nnx.Rngs) -> nnx.Module:
        """The module of one block."""
        raise NotImplementedError(f"{type(self).__name__} defines no build")

    def init_cache(self, attention: Attention, dims: Dims, batch_size: int, size: int, source: int) -> Any:
        """An empty cache for `size` positions, and `source` positions of an encoder, of a block with that attention."""
        return attention.init_cache(dims, batch_size, size)

    def score_flops(self, attention: Attention, width: int, keys: float) -> float:
        """As `Attention.score_flops`, for all attention of the block."""
        return attention.score_flops(width, keys)

    def kinds_of_weights(self, attention: Attention) -> Mapping[str, slice]:
        """Which heads of the module's `weights` are of which kind of attention, by name."""
        return {"self-attention": slice(None)}

    def mup_scaled(self, width: int, base: "BlockSpec", base_width: int) -> "BlockSpec":
        """This form with attention of its own scaled by muP: see `Attention.mup_scaled`."""
        return self


@dataclasses.dataclass(frozen=True)
class Layer(Spec):
    """One block of a pattern. What is null is that of the stack."""

    attention: Attention | None = None
    """The attention variant."""
    mlp: FeedForward | None = None
    """The feed-forward layer."""
    norm: Norm | None = None
    """The normalisation."""
    block: BlockSpec | None = None
    """How they are joined."""


@dataclasses.dataclass(frozen=True)
class Sequential(BlockSpec):
    """Attention, then the feed-forward layer, with the stack's `norm_placement`."""

    norm_placements = ("pre", "post")
    in_order = False

    def build(self, parts: Parts, rngs: nnx.Rngs) -> "Block":
        return Block(parts, rngs)


class Branches(nnx.Module):
    """Base of blocks with one attention and one feed-forward branch."""

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        dims = parts.dims
        self.dropout, self.routed = parts.dropout, parts.mlp.routed
        self.attention_norm = parts.norm.build(dims.width)
        self.attention = parts.attention.build(dims, rngs)
        self.mlp = parts.mlp.build(dims.width, rngs=rngs, dtype=dims.dtype, output_scale=dims.output_scale)

    def _mlp(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Losses]:
        y_BTD, losses = self.mlp(x_BTD, context) if self.routed else (self.mlp(x_BTD), {})
        return context.record("mlp", y_BTD), losses


class Block(Branches):
    """Attention, then a feed-forward layer. For each branch f, pre-norm is x + f(norm(x)), post-norm norm(x + f(x)).

    Xiong et al. (2002.04745), Figures 1b and 1a; Vaswani et al. (1706.03762) use post-norm.
    """

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        super().__init__(parts, rngs)
        self.mlp_norm = parts.norm.build(parts.dims.width)
        self.pre = parts.norm_placement == "pre"

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """[B, T, D] -> ([B, T, D], cache, losses of a routed layer). `key=None` disables dropout."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self._branch_input(x_BTD, self.attention_norm), context, cache)
        x_BTD = self._add_branch(x_BTD, context.record("attention", y_BTD), self.attention_norm, attention_key)
        y_BTD, losses = self._mlp(self._branch_input(x_BTD, self.mlp_norm), context)
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
