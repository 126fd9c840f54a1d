"""The attention contract: how variants are built and called, and what they return.

`spec.build(dims, rngs)` returns a module, and calling the module with `(x_BTD, context, cache)` returns `(y_BTD,
cache)`. Training uses no cache; prefill and decoding are the same call with one. The decoder, the caches and the media
towers depend only on this contract.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
from flax import nnx

from polygpt.attention.masks import DECODER, Mask
from polygpt.attention.meta import Meta
from polygpt.attention.zigzag import reordered
from polygpt.errors import SpecError
from polygpt.nn.positions import NoPosition, Position
from polygpt.spec import Spec

INSIDE = "null or an encoding that acts inside attention: one that adds to embeddings must be set on the stack"
"""The condition on a layer's `position`."""
QUERY, KEY, OUTPUT = ("width", "heads"), ("width", "kv_heads"), ("heads", "width")
"""The logical axes of the query kernel, of the key and value kernels, and of the output kernel."""


@dataclasses.dataclass(frozen=True)
class Dims:
    """The properties of the model that a variant is built into.

    Attributes:
        width: D, the model width.
        dtype: compute dtype; parameters, softmax and accumulation are float32.
        position: the position encoding; a variant calls its `rotate` on queries and keys.
        output_scale: factor on the initial output kernel (residual branches of deep models start small).
    """

    width: int
    dtype: str = "float32"
    position: Position = NoPosition()
    output_scale: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """What cross-attention attends to: the output of an encoder.

    Attributes:
        meta: metadata of the encoder's positions, [B, S]; segment 0 where it reads nothing.
        has_source_BT: bool, whether the example of each query has a source.
        hidden_BSD: the encoder's output; None if the keys and values made from it are cached.
    """

    meta: Meta
    has_source_BT: jax.Array
    hidden_BSD: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The context of a call, besides its input.

    Attributes:
        query: metadata of the positions of `x_BTD`, [B, T].
        key: metadata of all visible positions, [B, S]: `query` itself without a cache, otherwise the whole cache.
        mask: the predicate for visible pairs; a variant narrows it with `context.mask & Window(...)`.
        cursor: int32 scalar, the cache index at which to write the keys of `x_BTD`; None without a cache.
        coordinate_BT3: int32 (time, row, column) of the positions of `x_BTD`, for multidimensional encodings; None
            means that all three equal the position id.
        inputs_BTD: the input of the stack of blocks, for layers that attend to the embeddings; None in a single layer,
            which uses `x_BTD` instead.
        source: what cross-attention attends to; None without an encoder.
        before: the cached arrays and the segment of each row's last position, for running sums; set by the layer itself
            (`attention/cache.py`).
        training: whether this is a training step. Layers that approximate in training, such as experts with a capacity,
            are exact otherwise.
        recorder: takes what `record` is given; None if nothing inside the model is asked for.
    """

    query: Meta
    key: Meta
    mask: Mask = dataclasses.field(metadata={"static": True})
    cursor: jax.Array | None = None
    coordinate_BT3: jax.Array | None = None
    inputs_BTD: jax.Array | None = None
    source: Source | None = None
    before: Any = None
    training: bool = dataclasses.field(default=False, metadata={"static": True})
    recorder: Callable[[str, jax.Array], jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})

    def reordered(self, devices: int) -> "Context":
        """The context of a whole row without a cache, with its positions in zigzag order (`zigzag.py`)."""

        def moved(tree):
            return jax.tree.map(lambda x: reordered(x, devices), tree)

        query, source = moved(self.query), self.source
        if source is not None:
            source = dataclasses.replace(source, has_source_BT=moved(source.has_source_BT))
        coordinate_BT3 = moved(self.coordinate_BT3)
        return dataclasses.replace(self, query=query, key=query, coordinate_BT3=coordinate_BT3, source=source)

    def record(self, name: str, value: jax.Array) -> jax.Array:
        """Offers an activation of a block by name (`blocks/capture.py`). Returns the value that the block is to use."""
        return value if self.recorder is None else self.recorder(name, value)


def causal_mean(flops: Callable[[float], float], seq_len: int) -> float:
    """The mean of `flops`, a function of the number of visible keys, over 1, 2, ... `seq_len` keys.

    Assumes that `flops` is concave, as `score_flops` is: if the midpoint of an interval lies on its chord, so do all
    points.
    """

    def total(first: int, last: int) -> float:
        begin, end, middle = flops(first), flops(last), (first + last) // 2
        chord = begin + (end - begin) * (middle - first) / max(1, last - first)
        if last - first < 2 or abs(flops(middle) - chord) <= 1e-12 * chord:
            return (begin + end) / 2 * (last - first + 1)
        return total(first, middle) + total(middle + 1, last)

    return total(1, seq_len) / seq_len


def blank_context(batch_size: int) -> Context:
    """The context of a single first position per row, for shape inference."""
    meta = Meta.empty(batch_size, 1)
    return Context(meta, meta, DECODER)


@dataclasses.dataclass(frozen=True)
class Attention(Spec):
    """An attention variant. A new one derives from this class and needs no other edits."""

    family: ClassVar[Literal["softmax", "linear"]] = "softmax"
    """Whether each query weighs all keys, or the layer carries a state of fixed size along the row."""
    paper: ClassVar[str] = ""
    """Its source, for lists: an arXiv number, or "author, year, place". Subclasses must name their own."""
    mask_is_bound: ClassVar[bool] = False
    """Whether `mask` is only an upper bound on visible pairs, among which the inputs select (top-k selection of keys or
    blocks, exactly zero weights as in ReLU attention, gates so small that the weights of distant keys underflow)."""
    jumps: ClassVar[bool] = False
    """Whether results are discontinuous where a discrete choice changes (top-k selection, rounding). Gradients are then
    only compared with slopes between two jumps, and in bfloat16 some positions may choose differently. Kinks do not
    count as jumps."""
    in_order: ClassVar[bool] = True
    """Whether the positions of an array must be in the row's order, because neighbours are read, as by convolutions and
    running sums. If not, order and distance are read from metadata alone. A class that defines `build` declares it
    again: see `zigzag.needs_order`."""

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        """The module, called as `(x_BTD, context, cache=None) -> (y_BTD, cache)`.

        If the variant has attention weights, the module also has a method `weights(x_BTD, context, chosen_R=None) ->
        [B, H, R, S]`: an exact pass over the chosen queries (int32 indices; None for all), whatever the backend.

        With a cache, the result must not depend on how a row is split into calls, as long as no bidirectional span is
        split.
        """
        raise NotImplementedError

    def init_cache(self, dims: Dims, batch_size: int, size: int, ring: bool = True) -> Any:
        """An empty cache for `size` positions, a pytree of arrays whose first axis is that of rows.

        With `ring`, it may hold fewer positions if the variant never looks further back.
        """
        raise NotImplementedError

    def mixes_modalities(self) -> bool:
        """Whether a position of one modality may see another modality of its example."""
        return True

    def score_flops(self, width: int, keys: float) -> float:
        """FLOPs, excluding projections, for one query that sees `keys` keys at model width `width`."""
        raise NotImplementedError

    def backends(self) -> tuple[str, ...]:
        """Names of the backends in `kernels/` that can compute it; empty if it has its own implementation."""
        return ()

    def cost(self) -> str:
        """The formula of `score_flops` in axis letters, such as "4 H d S"."""
        raise NotImplementedError

    def labels(self) -> frozenset[str]:
        """Names of the labels that its mask reads, see `Mask.labels`."""
        return frozenset()

    def sees_ahead(self) -> bool:
        """Whether positions of a bidirectional span attend to later ones, if the mask allows it."""
        return self.family == "softmax"

    def mup_scaled(self, width: int, base: "Attention", base_width: int) -> "Attention":
        """This variant at model width `width`, scaled by muP (`optim/mup.py`) relative to `base` at `base_width`.

        Scores are sums over the channels of a head. muP divides them by the growth of the head width, not by its square
        root.

        Raises:
            SpecError: by default; a variant that derives directly from this class must define its own rule.
        """
        if (self, width) == (base, base_width):
            return self
        raise SpecError(
            f"{type(self).__name__} has no rule for muP: define its method mup_scaled, or set model.mup to null"
        )

    def differentiable(self) -> "Attention":
        """The variant without deliberate stop-gradients, for comparison with finite differences."""
        return self
