"""The attention contract: what every variant is built from, called with and gives back.

`spec.build(dims, rngs)` gives a module; the module called with `(x_BTD, context, cache)` gives `(y_BTD, cache)`.
Training has no cache; prefill and decoding are the same call with one. The decoder, the caches and the media towers
know no more of attention than this file.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.masks import DECODER, Mask, Meta
from polygpt.errors import SpecError
from polygpt.nn.positions import NoPosition, Position
from polygpt.spec import Spec

INSIDE = "null or one that acts inside attention: what adds to embeddings is set on the stack"
"""What the `position` of a layer has to be."""
QUERY, KEY, OUTPUT = ("width", "heads"), ("width", "kv_heads"), ("heads", "width")
"""The axes of the kernels of queries, of keys and values, and of the output, by which they are split over devices."""


@dataclasses.dataclass(frozen=True)
class Dims:
    """What a variant needs to know of the model it is built into.

    Attributes:
        width: D, the model width.
        dtype: the dtype to compute in; parameters, softmax and accumulation are float32.
        position: the position encoding; a variant calls its `rotate` on queries and keys.
        output_scale: scales the initial output kernel (residual branches of deep models start small).
    """

    width: int
    dtype: str = "float32"
    position: Position = NoPosition()
    output_scale: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a call needs to know beside its input.

    Attributes:
        query: metadata of the positions of `x_BTD`, [B, T].
        key: metadata of everything that may be seen, [B, S]: `query` itself without a cache, else of the whole cache.
        mask: the predicate that decides who sees whom; a variant narrows it with `context.mask & Window(...)`.
        cursor: int32 scalar, where in the cache the keys of `x_BTD` are to be written; None without a cache.
        coordinate_BT3: int32 (time, row, column) of the positions of `x_BTD`, for encodings of more than one axis; None
            means the position id in all three.
        inputs_BTD: what the stack of blocks was given, for layers that look at the embeddings; None in a lone layer,
            which takes `x_BTD` for it.
        before: of each row's last position in the cache, what the layer remembers and its segment, for running sums; a
            layer sets it for itself (`attention/cache.py`).
        training: whether this is a training step. Layers that approximate in training, such as experts of limited
            capacity, are exact otherwise.
    """

    query: Meta
    key: Meta
    mask: Mask = dataclasses.field(metadata={"static": True})
    cursor: jax.Array | None = None
    coordinate_BT3: jax.Array | None = None
    inputs_BTD: jax.Array | None = None
    before: Any = None
    training: bool = dataclasses.field(default=False, metadata={"static": True})


def causal_mean(flops: Callable[[float], float], seq_len: int) -> float:
    """The mean over a row of FLOPs, a function of the keys that a position sees: of 1, 2, ... `length` of them.

    It is concave, as `score_flops` is: where the middle of a stretch lies on its chord, all of it does.
    """

    def total(first: int, last: int) -> float:
        begin, end, middle = flops(first), flops(last), (first + last) // 2
        chord = begin + (end - begin) * (middle - first) / max(1, last - first)
        if last - first < 2 or abs(flops(middle) - chord) <= 1e-12 * chord:
            return (begin + end) / 2 * (last - first + 1)
        return total(first, middle) + total(middle + 1, last)

    return total(1, seq_len) / seq_len


def blank_context(batch_size: int) -> Context:
    """The context of one position a row, at the beginning of everything: for working out shapes."""
    meta = Meta(*[jnp.zeros((batch_size, 1), jnp.int32)] * 5)
    return Context(meta, meta, DECODER)


@dataclasses.dataclass(frozen=True)
class Attention(Spec):
    """An attention variant. A new one derives from this class; nothing else has to be edited."""

    family: ClassVar[Literal["softmax", "linear"]] = "softmax"
    """Whether it weighs all keys anew for each query, or carries a state of fixed size along the row."""
    paper: ClassVar[str] = ""
    """Its source, for lists: an arXiv number, or "author, year, place". Subclasses have to name their own."""
    mask_is_bound: ClassVar[bool] = False
    """Whether `mask` is an upper bound: of what it shows the inputs decide what is seen (top-k selection of keys or
    blocks, weights that are exactly zero as those of ReLU attention)."""
    jumps: ClassVar[bool] = False
    """Whether results jump where a discrete choice changes (top-k selection, rounding). Gradients are then compared
    with slopes between two jumps alone, and in bfloat16 some positions may choose otherwise. A kink needs no such word.
    """

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        """The module, called as `(x_BTD, context, cache=None) -> (y_BTD, cache)`.

        It has a method `weights(x_BTD, context, chosen_R=None) -> [B, H, R, S]` too where the variant has weights to
        look at: an exact pass over the chosen queries (int32 indices; None means all), whatever the backend.

        With a cache the result is that of the whole row at once, however it is cut into calls, as long as no
        bidirectional span is cut.
        """
        raise NotImplementedError

    def init_cache(self, dims: Dims, batch_size: int, size: int, ring: bool = True) -> Any:
        """An empty cache for `size` positions, a pytree whose arrays begin with the axis of rows.

        With `ring` it may be smaller than `size` positions where the variant never looks further back.
        """
        raise NotImplementedError

    def score_flops(self, width: int, keys: float) -> float:
        """FLOPs beside those of the projections, for one query that sees `keys` keys at the model width `width`."""
        raise NotImplementedError

    def backends(self) -> tuple[str, ...]:
        """Names of the backends in `kernels/` that can compute it; empty where it has a form of its own."""
        return ()

    def cost(self) -> str:
        """The formula of `score_flops` in the axis letters, as "4 H d S"."""
        raise NotImplementedError

    def sees_ahead(self) -> bool:
        """Whether positions of a bidirectional span see the later ones of it, where the mask says that they do."""
        return self.family == "softmax"

    def mup_scaled(self, width: int, base: "Attention", base_width: int) -> "Attention":
        """This variant at the model width `width` as muP has it (`optim/mup.py`) beside the `base` model's.

        Scores are sums over the channels of a head: they are divided by how many more there are than in the base, and
        no more by the root of that.

        Raises:
            SpecError: if the variant does not say how; one that derives from this class alone has to.
        """
        if (self, width) == (base, base_width):
            return self
        raise SpecError(
            f"{type(self).__name__} has no rule for muP: define its method beside, or set model.mup to null"
        )

    def differentiable(self) -> "Attention":
        """The same with no gradient stopped on purpose: what a comparison with finite differences has to look at."""
        return self
