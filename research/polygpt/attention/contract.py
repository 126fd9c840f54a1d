"""The attention contract: what every variant is built from, called with and gives back.

`spec.build(dims, rngs)` gives a module; the module called with `(x_BTD, context, cache)` gives `(y_BTD, cache)`.
Training has no cache; prefill and decoding are the same call with one. The decoder, the caches and the media towers
know no more of attention than this file.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from polygpt.attention.masks import Mask, Meta
from polygpt.nn.positions import NoPosition, Position
from polygpt.spec import Spec


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
    """

    query: Meta
    key: Meta
    mask: Mask = dataclasses.field(metadata={"static": True})
    cursor: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Attention(Spec):
    """An attention variant. A new one derives from this class; nothing else has to be edited."""

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        """The module, called as `(x_BTD, context, cache=None) -> (y_BTD, cache)`.

        It has a method `weights(x_BTD, context) -> [B, H, Tq, Tk]` too where the variant has weights to look at.
        """
        raise NotImplementedError

    def init_cache(self, dims: Dims, rows: int, size: int) -> Any:
        """An empty cache for `size` positions, a pytree whose arrays begin with the axis of rows."""
        raise NotImplementedError

    def score_flops(self, width: int, keys: float) -> float:
        """FLOPs beside those of the projections, for one query that sees `keys` keys at the model width `width`."""
        raise NotImplementedError
