"""The decoder: a stack of blocks over the sequence layout, causal by default, and its cache for generation."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import sharding
from polygpt.attention import zigzag
from polygpt.attention.contract import Context, Source
from polygpt.attention.kernels import dispatch
from polygpt.attention.masks import DECODER, ENCODER, Causal, SameSegment
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.scores import Score
from polygpt.blocks.stack import Stack, StackSpec
from polygpt.errors import SpecError
from polygpt.nn.dropout import dropout
from polygpt.nn.losses import Losses
from polygpt.nn.mlp import FeedForward, GatedMLP
from polygpt.nn.norms import Norm, RMSNorm
from polygpt.nn.positions import Position, Rope
from polygpt.sequence import Batch
from polygpt.sharding import MeshSpec


@dataclasses.dataclass(frozen=True)
class DecoderSpec(StackSpec):
    """A decoder. The defaults are the common modern form: RMSNorm, SwiGLU, rotary positions."""

    norm: Norm = RMSNorm()
    """The normalisation of each residual branch and, with pre-norm, after the last block."""
    mlp: FeedForward = GatedMLP()
    """The feed-forward layer of every block."""
    position: Position = Rope()
    """The position encoding."""
    tied: bool = True
    """Whether the output head shares the token embedding table."""
    mask: Literal["causal", "spans", "bidirectional"] = "spans"
    """What a position sees of its own example: causal: itself and earlier positions. spans: all positions of its
    bidirectional span too, if it is in one (`data.layout.media_span`, `prompt_span`). bidirectional: all positions: an
    encoder, which cannot generate."""
    embedding_noise: float = 0.0
    """Scale alpha of uniform noise that is added to the embeddings in training: NEFTune (2310.05914), algorithm 1; the
    paper uses 5 to 15."""

    def validate(self):
        super().validate()
        self.require(self.embedding_noise >= 0, "embedding_noise", "at least 0")

    def zigzag(self, mesh: MeshSpec, devices: int, seq_len: int) -> bool:
        """Whether devices that split the positions of rows hold them in zigzag order inside the blocks.

        Raises:
            SpecError: if the mesh asks for it, and a block needs the order of the row.
        """
        balanced = devices == 1 or seq_len % (2 * devices) or self.mask == "bidirectional" or self.depth == 0
        if mesh.order == "contiguous" or balanced:
            return False
        parts = [part for layer in self.period() for part in (layer.attention, layer.mlp, layer.block)]
        needing = next(filter(zigzag.needs_order, [*parts, self.position.score() or Score()]), None)
        if mesh.order == "zigzag" and needing is not None:
            raise SpecError(
                f"train.mesh.order is 'zigzag', but {type(needing).__name__} reads the positions of a row in order: "
                "set train.mesh.order to 'contiguous'"
            )
        # A window is as much work for every part of a row, and short rows are computed without skipping what is masked.
        # On TPUs the order must be asked for: libtpu 0.0.42 fails to compile some such steps ("Reshape should have
        # supported layout").
        masks = [layer.attention.mask(DECODER) for layer in self.period() if isinstance(layer.attention, MultiHead)]
        skips = seq_len >= dispatch.LONG and any(mask.reach() is None for mask in masks)
        skips &= dispatch.platform() != "tpu"
        return needing is None and (skips or mesh.order == "zigzag")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of a decoder after the positions read so far.

    Attributes:
        layers: the caches of the blocks, in the form of `StackSpec.init_cache`.
        seen: metadata of the positions in the cache, [B, S]; segment 0 in unused slots.
        cursor: int32 scalar, the number of positions written so far, including padding.
    """

    layers: Any
    seen: Meta
    cursor: jax.Array

    @property
    def size(self) -> int:
        """S, the capacity in positions."""
        return self.seen.index.shape[1]


def metadata(batch: Batch, cursor: jax.Array | int, labels: Sequence[str] = ()) -> Meta:
    """The metadata of a batch whose positions start at row index `cursor`, with these labels."""
    B, T = batch.shape
    index_BT = jnp.broadcast_to(cursor + jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    modality_BT = batch.modality_BT.astype(jnp.int32)
    extra = {name: whole_label(batch, name) for name in labels}
    return Meta(index_BT, batch.position_BT, batch.segment_BT, batch.span_BT, modality_BT, extra)


def whole_label(batch: Batch, name: str) -> jax.Array:
    """A label that is a whole number, int32 [B, T]; -1 where there is none."""
    if name not in batch.extra:
        return jnp.full(batch.shape, -1, jnp.int32)
    label_BT = jnp.asarray(batch.extra[name])
    return jnp.where(jnp.isnan(label_BT), -1, label_BT).astype(jnp.int32)


def init_cache(spec: DecoderSpec, batch_size: int, size: int, dtype: str, source: int = 0) -> Cache:
    """An empty cache of `size` positions, and of `source` positions of an encoder.

    Raises:
        SpecError: if positions see later ones, which are not there yet.
    """
    if spec.mask == "bidirectional":
        raise SpecError("model.decoder.mask is 'bidirectional': only a model with 'causal' or 'spans' can generate")
    seen = Meta.empty(batch_size, size, spec.labels())
    return Cache(spec.init_cache(batch_size, size, dtype, source), seen, jnp.zeros((), jnp.int32))


MASKS = {"causal": SameSegment() & Causal(), "spans": DECODER, "bidirectional": ENCODER}
"""The masks that `DecoderSpec.mask` names."""


class Decoder(Stack):
    """A stack over the sequence layout: embeddings `[B, T, D]` to hidden vectors `[B, T, D]`."""

    pipelined = True

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs, dtype: str):
        super().__init__(spec, rngs=rngs, dtype=dtype)
        self.position = spec.position.build(spec.width, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        batch: Batch,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        source: Source | None = None,
    ) -> tuple[jax.Array, Cache | None, Losses]:
        """Reads `batch` after the positions in `cache`; returns hidden vectors, the updated cache and the losses.

        `source` is what the cross-attention of its blocks attends to.
        """
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        if key is not None and self.spec.embedding_noise:
            x_BTD = x_BTD + self._noise(x_BTD, batch, jax.random.fold_in(embedding_key, 1))
        x_BTD = dropout(self._add_positions(x_BTD, batch), self.spec.dropout, embedding_key)
        context, seen = self._context(batch, cache)
        context = dataclasses.replace(context, training=key is not None, source=source)
        layout = sharding.active()
        if cache is not None:
            x_BTD, layers, losses = super().__call__(x_BTD, context, cache.layers, stack_key)
            return x_BTD, Cache(layers, seen, cache.cursor + batch.shape[1]), losses
        if layout is None or self.capture is not None or not self._in_zigzag(layout, batch.shape[1]):
            x_BTD, _, losses = super().__call__(x_BTD, context, None, stack_key)
            return x_BTD, None, losses
        context = context.reordered(layout.size("positions"))
        with sharding.use_layout(dataclasses.replace(layout, zigzag=True)):
            x_BTD, _, losses = super().__call__(zigzag.scattered(x_BTD, layout), context, None, stack_key)
        return zigzag.restored(x_BTD, layout), None, losses

    def _in_zigzag(self, layout, T):
        return self.spec.zigzag(layout.spec, layout.size("positions"), T)

    def weights(
        self, x_BTD: jax.Array, batch: Batch, chosen_R: jax.Array | None = None, source: Source | None = None
    ) -> dict[int, jax.Array]:
        """Attention weights of the chosen positions by block, float32 [B, H, R, T]; `chosen_R=None` selects all."""
        context = dataclasses.replace(self._context(batch, None)[0], source=source)
        return super().weights(self._add_positions(x_BTD, batch), context, chosen_R)

    def _noise(self, x_BTD, batch, key):
        """Uniform in -1..1, times alpha / sqrt(length of the example x width); 0 at padding."""
        same_BTT = batch.segment_BT[:, :, None] == batch.segment_BT[:, None, :]
        length_BT = jnp.sum(same_BTT, axis=-1)
        scale_BT = self.spec.embedding_noise * jnp.where(batch.segment_BT > 0, (length_BT * x_BTD.shape[-1]) ** -0.5, 0)
        return (jax.random.uniform(key, x_BTD.shape, minval=-1) * scale_BT[..., None]).astype(x_BTD.dtype)

    def _add_positions(self, x_BTD, batch):
        if self.position is None:
            return x_BTD
        return x_BTD + self.position(batch.position_BT).astype(x_BTD.dtype)

    def _context(self, batch, cache):
        if cache is None:
            meta = metadata(batch, 0, self.spec.labels())
            return Context(meta, meta, MASKS[self.spec.mask], coordinate_BT3=batch.coordinate_BT3), None
        query = metadata(batch, cache.cursor, self.spec.labels())
        seen = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.cursor, axis=1), cache.seen, query
        )
        return Context(query, seen, MASKS[self.spec.mask], cache.cursor, batch.coordinate_BT3), seen
