"""The block of a decoder that attends to an encoder: self-attention, cross-attention, feed-forward layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Attention, Context, Dims
from polygpt.attention.masks import SameSegment
from polygpt.attention.multi_head import MultiHead, MultiHeadModule
from polygpt.attention.zigzag import needs_order
from polygpt.blocks.block import Block, BlockSpec, Parts
from polygpt.errors import SpecError
from polygpt.nn.losses import Losses
from polygpt.nn.positions import NoPosition
from polygpt.spec import hints


@dataclasses.dataclass(frozen=True)
class CrossSequential(BlockSpec):
    """Self-attention, cross-attention to the encoder's output, then the feed-forward layer: Vaswani et al.
    (1706.03762), section 3.1, T5 (1910.10683), BART (1910.13461). For decoders of an `EncoderDecoder`."""

    norm_placements = ("pre", "post")
    branches = 3
    reads_source = True

    cross: MultiHead | None = None
    """Cross-attention; null for multi-head attention with the heads of the block's own attention, without positions, as
    in the papers. A `position` in it counts queries and keys each from the beginning of their side: where the answer
    follows the order of the source, Rope teaches the alignment sooner (experiments/encoder_decoder.py)."""

    def validate(self):
        if self.cross is None:
            return
        self.require(not self.cross.labels(), "cross", "attention whose mask reads no labels")
        whole = self.cross.mask(SameSegment()) == SameSegment()
        self.require(whole, "cross", "attention to the whole source, without a window or a pattern of its own")

    def cross_of(self, attention: Attention) -> MultiHead:
        """The cross-attention of a block with that self-attention. Raises SpecError if it must be given."""
        if self.cross is not None:
            return self.cross
        given = f"an attention variant, because {type(attention).__name__} has no heads to take over"
        self.require(isinstance(attention, MultiHead), "cross", given)
        same = {name: getattr(attention, name) for name in hints(MultiHead)}
        return MultiHead(**same | {"scores": (), "position": None})

    @property
    def in_order(self) -> bool:
        """Whether its cross-attention reads neighbours."""
        return self.cross is not None and needs_order(self.cross)

    def build(self, parts: Parts, rngs: nnx.Rngs) -> "CrossBlock":
        return CrossBlock(self.cross_of(parts.attention), parts, rngs)

    def init_cache(self, attention: Attention, dims: Dims, batch_size: int, size: int, source: int) -> Any:
        cross = self.cross_of(attention).init_cache(_unplaced(dims), batch_size, source, ring=False)
        return {"attention": attention.init_cache(dims, batch_size, size), "cross": cross.arrays}

    def score_flops(self, attention: Attention, width: int, keys: float) -> float:
        """Counts as many keys in the source as in the block's own stack."""
        return attention.score_flops(width, keys) + self.cross_of(attention).score_flops(width, keys)

    def kinds_of_weights(self, attention: Attention) -> Mapping[str, slice]:
        heads = self.cross_of(attention).heads
        return {"cross-attention": slice(-heads, None), "self-attention": slice(-heads)}

    def mup_scaled(self, width: int, base: BlockSpec, base_width: int) -> BlockSpec:
        return self.replace(cross=self.cross and self.cross.mup_scaled(width, base.cross, base_width))


class CrossBlock(Block):
    """Three residual branches, each with pre- or post-norm as in `Block`. The cache holds the keys and values of the
    source, computed where `Context.source` has the encoder's output."""

    def __init__(self, cross: MultiHead, parts: Parts, rngs: nnx.Rngs):
        super().__init__(parts, rngs)
        self.cross_norm = parts.norm.build(parts.dims.width)
        self.cross: MultiHeadModule = cross.build(_unplaced(parts.dims), rngs)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any, Losses]:
        """[B, T, D] -> ([B, T, D], cache, losses of a routed layer). `key=None` disables dropout."""
        attention_key, cross_key, mlp_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        own = None if cache is None else cache["attention"]
        y_BTD, own = self.attention(self._branch_input(x_BTD, self.attention_norm), context, own)
        x_BTD = self._add_branch(x_BTD, context.record("attention", y_BTD), self.attention_norm, attention_key)
        y_BTD, seen = self._attend(self._branch_input(x_BTD, self.cross_norm), context, cache and cache["cross"])
        x_BTD = self._add_branch(x_BTD, context.record("cross", y_BTD), self.cross_norm, cross_key)
        y_BTD, losses = self._mlp(self._branch_input(x_BTD, self.mlp_norm), context)
        x_BTD = self._add_branch(x_BTD, y_BTD, self.mlp_norm, mlp_key)
        return x_BTD, None if cache is None else {"attention": own, "cross": seen}, losses

    def weights(self, x_BTD: jax.Array, context: Context, chosen_R: jax.Array | None = None) -> jax.Array:
        """Weights of the chosen queries, float32 [B, 2 H, R, T]: the heads of self-attention, then those of
        cross-attention, whose keys are the positions of the source. `chosen_R=None` selects all queries."""
        input_BTD = self._branch_input(x_BTD, self.attention_norm)
        own_BHRT = self.attention.weights(input_BTD, context, chosen_R)
        y_BTD, _ = self.attention(input_BTD, context)
        x_BTD = self._branch_input(self._add_branch(x_BTD, y_BTD, self.attention_norm, None), self.cross_norm)
        operands = self._operands(x_BTD, context, None)[0]
        if chosen_R is not None:
            operands = operands.of_queries(chosen_R)
        return jnp.concatenate([own_BHRT, self.cross.weights_with_prefix(self._rule(), operands)], axis=1)

    def _attend(self, x_BTD, context, kept):
        """Cross-attention [B, T, D], zeros in examples without a source; the keys and values of the source."""
        operands, seen = self._operands(x_BTD, context, kept)
        y_BHTe, lse_BHT = self.cross.with_prefix(self._rule(), operands)
        y_BTD = self.cross.mixed(y_BHTe, lse_BHT, x_BTD, context)
        return jnp.where(context.source.has_source_BT[..., None], y_BTD, 0), seen

    def _operands(self, x_BTD, context, kept):
        source = context.source
        if source is None:
            raise SpecError("CrossSequential blocks attend to an encoder: use them in the decoder of an EncoderDecoder")
        context = dataclasses.replace(context, coordinate_BT3=None, before=None, cursor=None)
        if source.hidden_BSD is not None:
            at_source = dataclasses.replace(context, query=source.meta, key=source.meta)
            kept = self.cross.remembered(source.hidden_BSD, at_source)
        return self.cross.operands(x_BTD, context, kept, source.meta), kept

    def _rule(self):
        return dataclasses.replace(self.cross.spec.rule(SameSegment(), self.cross.dims), across=True)


def _unplaced(dims: Dims) -> Dims:
    """The dimensions without the stack's position encoding, which counts the decoder's positions, not the source's."""
    return dataclasses.replace(dims, position=NoPosition())
