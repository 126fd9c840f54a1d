"""The encoder-decoder: one stack reads the source of each example, the other writes the rest and attends to it.

The source is the prompt: what precedes the first text with a loss weight, media included, in the rows of a layout whose
`prompt_span` is "bidirectional". The last position of the source predicts the first token of the rest, so there the
decoder reads a learned vector `start`: the start token of T5 (1910.10683) and BART (1910.13461). The decoder counts its
positions from there.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.biases import T5Bias
from polygpt.attention.contract import Source
from polygpt.attention.meta import Meta
from polygpt.blocks.cross import CrossSequential
from polygpt.blocks.stack import StackSpec
from polygpt.errors import SpecError
from polygpt.models.decoder import Cache, Decoder, DecoderSpec, init_cache, metadata
from polygpt.models.multimodal import ModelSpec, MultimodalModel
from polygpt.nn.losses import Losses, add
from polygpt.sequence import PROMPT, Batch


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(ModelSpec):
    """An encoder reads the source of each example in both directions, a decoder writes the rest and attends to it:
    T5 (1910.10683), BART (1910.13461); with audio in the source Whisper (2212.04356).

    Set `data.layout.prompt_span` to "bidirectional". T5 1.1 in its small size:

        attention = MultiHead(heads=6, head_width=64, scale=1.0)
        fields = {"attention": attention, "mlp": GatedMLP(2, activation="gelu_tanh"), "position": T5Bias()}
        EncoderDecoder(DecoderSpec(width=512, depth=8, block=CrossSequential(), tied=False, **fields))

    BART and Marian have `norm_placement="post"`, `LayerNorm`, `Learned` positions and biases.

    Both stacks compute all T positions of a row, masked to their own, so that one compiled program reads every mixture
    of prompts and answers. Where prompts take a share s of the positions, T s of the encoder and T (1 - s) of the
    decoder would do: about half of the FLOPs, whatever s, if the stacks cost the same. Saving them takes rows of two
    lengths, packed to fit both. In the first call of a generation, the decoder's cache has slots for the whole prompt,
    and those of its source stay unused.
    """

    decoder: DecoderSpec = DecoderSpec(block=CrossSequential())
    """The decoder, of blocks that attend to the encoder (polygpt.blocks.cross:CrossSequential)."""
    encoder: DecoderSpec | None = None
    """The encoder, a stack of the decoder's width whose mask is "bidirectional"; null for one like the decoder, without
    its pattern and cross-attention, and with biases for both directions if these are T5's."""

    def validate(self):
        self.decoder.require(self.decoder.mask == "spans", "mask", "'spans' in the decoder of an EncoderDecoder")
        for layer in self.decoder.period():
            if isinstance(layer.block, CrossSequential):
                layer.block.cross_of(layer.attention)
        own = self.encoder_stack()
        own.require(own.mask == "bidirectional", "mask", "'bidirectional' in an encoder")
        own.require(own.width == self.decoder.width, "width", f"{self.decoder.width} in the encoder, as in the decoder")
        own.require(not _reads_source(own), "block", "one without cross-attention in an encoder, such as Sequential")
        for layer in own.period():
            if layer.attention.family != "softmax":
                name = type(layer.attention).__name__
                raise SpecError(f"the encoder has {name}, which reads a row in one direction: set model.encoder")
            layer.mlp.check_modalities(("text", *self.adapters))
        super().validate()

    def encoder_stack(self) -> DecoderSpec:
        """The encoder, never None."""
        if self.encoder is not None:
            return self.encoder
        same = {field.name: getattr(self.decoder, field.name) for field in dataclasses.fields(StackSpec)}
        del same["pattern"], same["block"]
        if isinstance(self.decoder.position, T5Bias):
            same["position"] = self.decoder.position.replace(bidirectional=True)
        return DecoderSpec(**same, mask="bidirectional", embedding_noise=self.decoder.embedding_noise)

    def stacks(self) -> dict[str, DecoderSpec]:
        return {"encoder": self.encoder_stack()} | super().stacks()

    def validate_source(self):
        allowed = "CrossSequential in the decoder of an EncoderDecoder, at least in a part of its pattern"
        self.decoder.require(_reads_source(self.decoder), "block", allowed)

    def check_with(self, layout) -> None:
        super().check_with(layout)
        if layout.prompt_span != "bidirectional":
            raise SpecError(
                f"data.layout.prompt_span is {layout.prompt_span!r}: EncoderDecoder finds the source of an example by "
                "it, set it to 'bidirectional'"
            )

    def build(self, vocabulary: int, rngs: nnx.Rngs) -> "EncoderDecoderModel":
        return EncoderDecoderModel(self, vocabulary, rngs)

    def init_cache(self, batch_size: int, size: int) -> "EncoderDecoderCache":
        return EncoderDecoderCache(super().init_cache(batch_size, size))


def _reads_source(stack: StackSpec) -> bool:
    return any(layer.block.reads_source for layer in stack.period())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sources:
    """The positions of a row that the encoder reads.

    Attributes:
        meta: their metadata, [B, S]; segment 0 elsewhere.
        coordinate_BS: the largest coordinate of each.
    """

    meta: Meta
    coordinate_BS: jax.Array

    def before(self, segment_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For positions of these examples, int32 [B, T]: how many positions the source of their example has, and its
        largest coordinate; 0 without a source."""
        own_BTS = (segment_BT[:, :, None] == self.meta.segment[:, None]) & (self.meta.segment > 0)[:, None]
        return own_BTS.sum(axis=-1), jnp.where(own_BTS, self.coordinate_BS[:, None], 0).max(axis=-1)

    def read_by_decoder(self, batch: Batch) -> tuple[Batch, jax.Array]:
        """The batch as the decoder reads it, and whether an example has a source, bool [B, T].

        Positions of the source are padding, but for the last one, which is position 0; others are counted from it.
        """
        length_BT, coordinate_BT = self.before(batch.segment_BT)
        position_BT = batch.position_BT - jnp.maximum(length_BT - 1, 0)
        mine_BT = (batch.segment_BT > 0) & (position_BT >= 0)
        coordinate_BT3 = batch.coordinate_BT3
        if coordinate_BT3 is not None:
            first_BT = (length_BT > 0) & (position_BT == 0)
            coordinate_BT3 = jnp.where((mine_BT & ~first_BT)[..., None], coordinate_BT3 - coordinate_BT[..., None], 0)
        batch = batch.replace(
            segment_BT=jnp.where(mine_BT, batch.segment_BT, 0),
            position_BT=jnp.where(mine_BT, position_BT, 0),
            span_BT=jnp.where(batch.span_BT == PROMPT, 0, batch.span_BT),
            coordinate_BT3=coordinate_BT3,
        )
        return batch, length_BT > 0


def read_by_encoder(batch: Batch) -> tuple[Batch, Sources]:
    """The batch as the encoder reads it, with padding in place of all but sources, and where these are."""
    source_BT = (batch.span_BT == PROMPT) & (batch.segment_BT > 0)
    batch = batch.replace(segment_BT=jnp.where(source_BT, batch.segment_BT, 0))
    largest_BT = batch.position_BT if batch.coordinate_BT3 is None else batch.coordinate_BT3.max(axis=-1)
    return batch, Sources(metadata(batch, 0), largest_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderDecoderCache:
    """The state of generation.

    Attributes:
        decoder: the decoder's cache, with the keys and values that its blocks make from the encoder's output.
        sources: what the encoder has read; None before the first call, the only one that runs the encoder.
    """

    decoder: Cache
    sources: Sources | None = None

    @property
    def size(self) -> int:
        """The capacity in positions."""
        return self.decoder.size


class Encoder(Decoder):
    """The stack that reads sources."""

    name = "encoder"


class EncoderDecoderModel(MultimodalModel):
    """Parameters: those of `MultimodalModel`, `encoder/...` and `start`."""

    def __init__(self, spec: EncoderDecoder, vocabulary: int, rngs: nnx.Rngs):
        super().__init__(spec, vocabulary, rngs)
        self.encoder = Encoder(spec.scaled().encoder_stack(), rngs=rngs, dtype=spec.dtype)
        start_D = jax.random.normal(rngs.params(), (spec.decoder.width,)) * spec.base().decoder.width ** -0.5
        self.start = nnx.Param(start_D, axes=(None,), decays=False)

    def hidden(
        self, batch: Batch, cache: EncoderDecoderCache | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, EncoderDecoderCache | None, Losses]:
        """The normalised output [B, T, D] of the encoder at positions of the source but its last one, and of the
        decoder elsewhere; the updated cache and the losses of all layers. With a cache, the source must lie within the
        first call."""
        media_key, stacks_key = (None, None) if key is None else jax.random.split(key)
        x_BTD, losses = self.embed(batch, media_key)
        if cache is not None and cache.sources is not None:
            written, has_source_BT = cache.sources.read_by_decoder(batch)
            source = Source(cache.sources.meta, has_source_BT)
            hidden_BTD, kept, own = self.decoder(x_BTD, written, cache.decoder, source=source)
            return hidden_BTD, dataclasses.replace(cache, decoder=kept), add(losses, own)
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(stacks_key)
        written, written_BTD, source, sources, encoding = self._encode(x_BTD, batch, encoder_key)
        kept = None
        if cache is not None:  # nothing is in it yet: make one with room for the source
            rows, size = cache.decoder.seen.index.shape
            kept = init_cache(self.decoder.spec, rows, size, self.decoder.dtype, batch.shape[1])
        hidden_BTD, kept, own = self.decoder(written_BTD, written, kept, decoder_key, source)
        here_BT = (sources.meta.segment > 0) & (written.segment_BT == 0)
        hidden_BTD = jnp.where(here_BT[..., None], source.hidden_BSD, hidden_BTD)
        return hidden_BTD, cache and EncoderDecoderCache(kept, sources), add(losses, encoding, own)

    def weights(self, batch: Batch, chosen_R: jax.Array | None = None) -> dict[int, jax.Array]:
        """Attention weights of the chosen positions by decoder block, float32 [B, 2 H, R, T]: the heads of
        self-attention, whose keys are positions of the decoder, then those of cross-attention, whose keys are positions
        of the source."""
        written, written_BTD, source, *_ = self._encode(self.embed(batch)[0], batch, None)
        return self.decoder.weights(written_BTD, written, chosen_R, source)

    def _encode(self, x_BTD, batch, key) -> tuple[Batch, jax.Array, Source, Sources, Losses]:
        """The batch and the embeddings [B, T, D] that the decoder reads, the encoded source and where it is."""
        read, sources = read_by_encoder(batch)
        source_BTD = jnp.where((read.segment_BT > 0)[..., None], x_BTD, 0)
        encoded_BTD, _, losses = self.encoder(source_BTD, read, key=key)
        written, has_source_BT = sources.read_by_decoder(batch)
        first_BT = (read.segment_BT > 0) & (written.segment_BT > 0)
        x_BTD = jnp.where(first_BT[..., None], self.start[...].astype(x_BTD.dtype), x_BTD)
        x_BTD = jnp.where((written.segment_BT > 0)[..., None], x_BTD, 0)
        return written, x_BTD, Source(sources.meta, has_source_BT, encoded_BTD), sources, losses
