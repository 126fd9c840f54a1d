"""The multimodal model: adapters embed media among the text tokens, and one decoder reads the row."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.adapters.base import Adapter, SharedConnector
from polygpt.adapters.text import TextEmbedding
from polygpt.blocks.capture import MEDIA, Capture
from polygpt.blocks.stack import StackSpec
from polygpt.errors import SpecError
from polygpt.heads.base import Head, HeadModule
from polygpt.models.decoder import Cache, Decoder, DecoderSpec, init_cache
from polygpt.models.drop_connect import DropConnect
from polygpt.models.initial import Initial
from polygpt.models.low_rank import LowRank
from polygpt.models.prefix import PrefixTuning
from polygpt.nn.linear import Linear
from polygpt.nn.losses import Losses, add
from polygpt.objectives import blocked
from polygpt.optim.mup import MuP
from polygpt.sequence import Batch, scatter_media
from polygpt.sharding import LOGITS, RESIDUAL, constrain
from polygpt.spec import Spec, nearest


@dataclasses.dataclass(frozen=True)
class ModelSpec(Spec):
    """A decoder, and adapters for the modalities that it reads besides text."""

    decoder: DecoderSpec = DecoderSpec()
    """The decoder."""
    adapters: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)
    """Adapters by modality ("image", "audio", ...); empty for a text-only model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, normalisations, softmax and losses are always float32."""
    mup: MuP | None = None
    """Maximal update parametrization: learning rates and initial scales of a narrower base model, adjusted for width;
    null for the standard parametrization."""
    connector: SharedConnector | None = None
    """A connector shared by all adapters, after their own; null for none. Adapters then output vectors of its width; if
    their own connectors have kind "none", the shared projection is the only one."""

    logits_block: blocked.Block = "auto"
    """Number of positions per device whose logits exist at a time, in training and scoring, at least one per row; null
    for all. "auto" is as many as take 64 MiB, at least the width, or all if blocks would spare less than the head and
    its gradient take. Saves memory if the vocabulary is large, without computing anything twice. Objectives that read
    all logits still need them."""

    initial: tuple[Initial, ...] = ()
    """How matrices are initialised that these patterns match; others as their layers define."""

    drop_connect: DropConnect | None = None
    """Drops elements of matrices in training; null for none."""

    low_rank: LowRank | None = None
    """Trains low-rank updates of matrices and freezes all other parameters; null trains all."""

    prefix: PrefixTuning | None = None
    """Trains keys and values in front of the sequence and freezes all other parameters; null trains all."""

    heads: Mapping[str, Head] = dataclasses.field(default_factory=dict)
    """Heads by name, besides that of the vocabulary, which objectives read: for classes, numbers and contrast."""

    def validate(self):
        self.require(self.low_rank is None or self.mup is None, "low_rank", "null with mup")
        self.require(self.prefix is None or self.mup is None, "prefix", "null with mup")
        some = isinstance(self.logits_block, int)
        self.require(not some or self.logits_block >= 1, "logits_block", '"auto", null or at least 1')
        for layer in self.decoder.period():
            layer.mlp.check_modalities(("text", *self.adapters))
        self.validate_source()
        self.base()

    def validate_source(self):
        """Requires that blocks attend to an encoder only where there is one."""
        alone = not any(layer.block.reads_source for layer in self.decoder.period())
        self.decoder.require(alone, "block", "one without cross-attention, or the model an EncoderDecoder")

    def check_with(self, layout) -> None:
        """Raises SpecError unless the model can read the rows of `layout`, a `LayoutSpec`."""
        for field in ("media_span", "prompt_span"):
            unread = self.decoder.mask == "causal" and getattr(layout, field) == "bidirectional"
            layout.require(not unread, field, "causal, or model.decoder.mask 'spans'")
        for name, stack in self.stacks().items():
            for label in stack.labels():
                known = label in layout.labels and layout.labels[label].whole
                layout.require(known, "labels", f"such that {label!r}, which a mask of model.{name} reads, has classes")
            limit = stack.position.limit()
            fits = limit is None or layout.seq_len <= limit
            of = f"the number of positions of model.{name}.position"
            layout.require(fits, "seq_len", f"at most {limit}, {of}")
        for name, adapter in self.adapters.items():
            tower = getattr(adapter, "tower", None)
            if tower is not None and tower.labels():
                raise SpecError(f"model.adapters.{name}.tower: its mask reads labels, which only the decoder has")

    def check_reading(self, layout) -> None:
        """As `check_with`, for rows of another model's data, whose spans a causal decoder reads from left to right."""
        causal = self.decoder.mask == "causal"
        self.check_with(layout.replace(media_span="causal", prompt_span="causal") if causal else layout)

    def build(self, vocabulary: int, rngs: nnx.Rngs) -> "MultimodalModel":
        """The module for `vocabulary` token ids. A model of another kind is a subclass that builds another module, with
        the methods `hidden`, `logits`, `output_head` and `weights` of `MultimodalModel`, and `head_of` for `heads`."""
        return MultimodalModel(self, vocabulary, rngs)

    def init_cache(self, batch_size: int, size: int) -> Any:
        """An empty cache for `batch_size` rows of at most `size` positions, as the module's `hidden` takes it."""
        return init_cache(self.decoder, batch_size, size, self.dtype)

    def stacks(self) -> dict[str, DecoderSpec]:
        """The stacks that read whole rows, by the names of their parameters."""
        return {"decoder": self.decoder}

    def labels(self) -> tuple[str, ...]:
        """Names of the labels that masks of these stacks read, in order."""
        return tuple(sorted({label for stack in self.stacks().values() for label in stack.labels()}))

    def limit(self) -> int | None:
        """The number of positions of a row that the position encodings support; None is unbounded."""
        limits = (stack.position.limit() for stack in self.stacks().values())
        return min((limit for limit in limits if limit is not None), default=None)

    def scaled(self) -> "ModelSpec":
        """The model without `mup`, with the attention of all its stacks scaled by it."""
        return self if self.mup is None else _mup_scaled(self.replace(mup=None), self.base())

    def base(self) -> "ModelSpec":
        """The base model of `mup`; without muP, the model itself."""
        return self if self.mup is None else self.mup.base_of(self)

    def positions(self) -> dict[str, int]:
        """P of every adapter, in the order that numbers the modalities."""
        return {name: adapter.positions for name, adapter in self.adapters.items()}


def _mup_scaled(value, base):
    """`value` with all its stacks of blocks scaled by muP relative to those of `base`."""
    if isinstance(value, StackSpec):
        return value.mup_scaled(base)
    if isinstance(value, Mapping):
        return {name: _mup_scaled(item, base[name]) for name, item in value.items()}
    if not isinstance(value, Spec):
        return value
    return value.replace(**{name: _mup_scaled(item, getattr(base, name)) for name, item in vars(value).items()})


class MultimodalModel(nnx.Module):
    """Parameters: `text/...`, `adapters/<name>/...`, `connector/...` if adapters share one, `modality/<name>`,
    `decoder/...`, `head/...` if it is not tied, and `heads/<name>/...`."""

    capture: Capture | None = None
    """What takes embeddings of media out of the next pass, see `blocks/capture.py`."""

    def __init__(self, spec: ModelSpec, vocabulary: int, rngs: nnx.Rngs):
        width, options = spec.decoder.width, {"rngs": rngs, "dtype": spec.dtype}
        base, spec = spec.base(), spec.scaled()
        self.names = tuple(spec.adapters)
        self.text = TextEmbedding(vocabulary, width, base_width=base.decoder.width, **options)
        given = spec.connector.width if spec.connector else width
        self.adapters = nnx.Dict({name: adapter.build(given, **options) for name, adapter in spec.adapters.items()})
        self.connector = spec.connector.build(given, width, **options) if spec.connector else None
        self.modality = nnx.Dict({name: nnx.Param(jnp.zeros(width), axes=(None,)) for name in spec.adapters})
        self.decoder = Decoder(spec.decoder, **options)
        head = {"bias": False, "axes": ("width", "vocabulary")}
        self.head = None if spec.decoder.tied else Linear(width, vocabulary, **head, **options)
        self.heads = nnx.Dict({name: one.build(width, **options) for name, one in spec.heads.items()})

    def embed(self, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Losses]:
        """The decoder's input [B, T, D], and the losses of the adapters.

        Only the adapters named in `batch.media` are used.
        """
        losses = {}
        media = dict.fromkeys(self.names)  # in the order of the specification: jit sorts the keys of batch.media
        for number, name in enumerate(self.names, start=1):
            if name not in batch.media:
                continue
            here = None if key is None else jax.random.fold_in(key, number)
            found = self.adapters[name](batch.media[name], here)
            embedded_BNPD, own = found if isinstance(found, tuple) else (found, {})
            losses = add(losses, own)
            if self.connector is not None:
                embedded_BNPD = self.connector(embedded_BNPD)
            embedded_BNPD += self.modality[name][...].astype(embedded_BNPD.dtype)[None, None, None]
            media[name] = constrain(embedded_BNPD, "batch", None, None, "features")  # each row needs all its media
            if self.capture is not None and name in self.capture.wanted:
                self.capture.found[MEDIA + name] = media[name]
        return constrain(scatter_media(self.text(batch.tokens_BT), batch, media), *RESIDUAL), losses

    def hidden(
        self, batch: Batch, cache: Cache | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None, Losses]:
        """The decoder's normalised output [B, T, D], the updated cache, and the losses of all layers."""
        media_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        x_BTD, own = self.embed(batch, media_key)
        hidden_BTD, cache, losses = self.decoder(x_BTD, batch, cache, decoder_key)
        return hidden_BTD, cache, add(own, losses)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]."""
        if self.head is None:
            return constrain(self.text.logits(hidden_BTD), *LOGITS)
        return constrain(self.head(hidden_BTD, output_dtype="float32"), *LOGITS)

    def head_of(self, name: str) -> HeadModule:
        """The head with that name. Raises SpecError if there is none."""
        if name not in self.heads:
            there = nearest(name, self.heads) if self.heads else "there are none"
            raise SpecError(f"an objective reads the head {name!r}, which is not in model.heads: {there}")
        return self.heads[name]

    def output_head(self) -> blocked.Head:
        """What `logits` multiplies with, for losses that compute them in blocks."""
        if self.head is None:
            return blocked.Head(self.text.table[...], ("vocabulary", "width"), self.text.multiplier, self.text.dtype)
        return blocked.Head(self.head.kernel[...], ("width", "vocabulary"), dtype=self.head.dtype)

    def weights(self, batch: Batch, chosen_R: jax.Array | None = None) -> dict[int, jax.Array]:
        """Attention weights of the chosen positions by decoder block, float32 [B, H, R, T]."""
        return self.decoder.weights(self.embed(batch)[0], batch, chosen_R)
