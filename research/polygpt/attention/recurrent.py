"""The linear attention family: instead of scores, a state of fixed size per head that each position updates and reads.

A variant derives from `Recurrent` and overrides a method of the module that prepares inputs for the recurrence of
`kernels/recurrence.py` (`placed` for queries and keys, `log_decay`, `recur`). Projections, positions, segment starts,
padding, the cache, and the chunked and single-step forms are inherited. A variant with other projections (Mamba-2)
derives from `Stateful`, and its module from `StatefulModule`.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.attention.contract import INSIDE, OUTPUT, QUERY, Attention, Context, Dims
from polygpt.attention.kernels.recurrence import SegmentStarts, linear_recurrence, segment_starts
from polygpt.attention.masks import Mask
from polygpt.attention.meta import Meta
from polygpt.attention.multi_head import joined
from polygpt.attention.short_convolution import ShortConvolution
from polygpt.errors import SpecError
from polygpt.nn.linear import Linear
from polygpt.nn.mlp import Activation, activate
from polygpt.nn.norms import Norm, RMSNorm
from polygpt.nn.positions import Position
from polygpt.sharding import RESIDUAL, constrain


@dataclasses.dataclass(frozen=True)
class Stateful(Attention):
    """An attention that carries a state along the row."""

    family: ClassVar[Literal["softmax", "linear"]] = "linear"

    heads: int = 4
    """H, the number of heads."""
    head_width: int | None = None
    """The head width; null to divide the layer's width among the heads."""
    bias: bool = False
    """Whether the projections have a bias."""
    position: Position | None = None
    """The position encoding of this layer; null for that of the stack."""
    convolution: int = 0
    """Kernel size of a causal convolution over the projections; 0 for none."""
    chunk: int = 64
    """Positions per chunk, a power of two. Affects time and memory, not the result."""

    def validate(self):
        self.require(self.heads >= 1, "heads", "at least 1")
        self.require(self.head_width is None or self.head_width >= 1, "head_width", "null or at least 1")
        self.require(self.convolution >= 0 and self.convolution != 1, "convolution", "0, or at least 2")
        self.require(self.chunk >= 2 and self.chunk & (self.chunk - 1) == 0, "chunk", "a power of two, at least 2")
        self.require(self.position is None or not self.position.adds(), "position", INSIDE)

    def encoding(self, dims: Dims) -> Position:
        """The position encoding of this layer. Raises SpecError if it acts on scores."""
        position = dims.position if self.position is None else self.position
        if position.score() is not None:
            raise SpecError(
                f"{type(self).__name__}.position: {type(position).__name__} acts on scores, which linear attention "
                "does not have: set it to Rope() or NoPosition()"
            )
        return position

    def mup_scaled(self, width: int, base: Attention, base_width: int) -> Attention:
        return self  # each head's output is normalised

    def part(self, whole: int, name: str) -> int:
        """The head width if all heads together have width `whole`."""
        self.require(whole % self.heads == 0, "heads", f"a divisor of {whole}, or set {name}")
        return whole // self.heads

    def init_cache(self, dims: Dims, batch_size: int, size: int, ring: bool = True) -> Any:
        shapes = nnx.eval_shape(lambda: self.build(dims, nnx.Rngs(0)).empty(batch_size))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


class StatefulModule(nnx.Module):
    """The module of a `Stateful`. A variant implements `empty_state` and `read`."""

    convolve: ShortConvolution | None = None

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        check_mask(type(self.spec).__name__, context.mask)
        # A recurrence over split positions would visit the devices one after the other, so use whole rows.
        x_BTD, context = _with_whole_rows(x_BTD, context)
        before = self.empty(x_BTD.shape[0]) if cache is None else cache
        starts = segment_starts(context.query.segment, before["last"])
        y_BTD, state, past = self.read(x_BTD, context, starts, before["state"], before["past"])
        y_BTD = constrain(jnp.where(starts.real_BT[..., None], y_BTD, 0), *RESIDUAL)
        return y_BTD, None if cache is None else {"state": state, "past": past, "last": starts.last_B}

    def empty(self, batch_size: int) -> Any:
        """An empty cache."""
        past = self.convolve and self.convolve.empty(batch_size, self.dims.dtype)
        return {"state": self.empty_state(batch_size), "past": past, "last": jnp.zeros(batch_size, jnp.int32)}

    def empty_state(self, batch_size: int) -> Any:
        """The state before the first position, a pytree of float32 [B, H, ...]."""
        raise NotImplementedError

    def read(
        self, x_BTD: jax.Array, context: Context, starts: SegmentStarts, state: Any, past: Any
    ) -> tuple[jax.Array, Any, Any]:
        """(output [B, T, D], the new state, the convolution's past inputs)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Recurrent(Stateful):
    """Linear attention with a normalised output instead of a normaliser. Qin et al., TransNormer (2210.10340, 4.1).

    S_t = S_{t-1} + k_t v_t^T, y_t = norm(S_t^T q_t): eq. 18 of Katharopoulos et al. (2006.16236) without a feature map.
    """

    paper = "2210.10340"

    value_width: int | None = None
    """e, the width of a head's values; null for the model width divided by `heads`."""
    rotates: bool = True
    """Whether the position encoding rotates queries and keys."""
    activation: Activation = "identity"
    """Activation of queries, keys and values after projection and convolution."""
    norm: Norm | None = RMSNorm()
    """Normalisation of each head's output."""
    gate: bool = False
    """Whether to multiply the output by silu of another projection of the input."""

    def width_of_head(self, width: int) -> int:
        """d, the width of a head's queries and keys at model width `width`."""
        return self.head_width or self.part(width, "head_width")

    def width_of_value(self, width: int) -> int:
        """e at model width `width`."""
        return self.value_width or self.part(width, "value_width")

    def mup_scaled(self, width: int, base: Attention, base_width: int) -> Attention:
        wider = self.width_of_head(width) != base.width_of_head(base_width)
        self.require(not wider or self.norm is not None, "norm", "set if heads are wider than in muP's base model")
        return super().mup_scaled(width, base, base_width)

    def build(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module:
        return RecurrentModule(self, dims, rngs)

    def score_flops(self, width: int, keys: float) -> float:
        return 4 * self.heads * self.width_of_head(width) * self.width_of_value(width)

    def cost(self) -> str:
        return "4 H d e"


class RecurrentModule(StatefulModule):
    """The module of a `Recurrent`. Variants override some of `placed`, `log_decay`, `recur` and `empty_state`."""

    def __init__(self, spec: Recurrent, dims: Dims, rngs: nnx.Rngs):
        self.spec, self.dims, self.encoding = spec, dims, spec.encoding(dims)
        H, d, e = spec.heads, spec.width_of_head(dims.width), spec.width_of_value(dims.width)
        options = {"rngs": rngs, "dtype": dims.dtype, "bias": spec.bias}
        self.query = Linear(dims.width, H * d, axes=QUERY, **options)
        self.key = Linear(dims.width, H * d, axes=QUERY, **options)
        self.value = Linear(dims.width, H * e, axes=QUERY, **options)
        self.gate = Linear(dims.width, H * e, axes=QUERY, **options) if spec.gate else None
        self.output = Linear(H * e, dims.width, scale=dims.output_scale, axes=OUTPUT, **options)
        self.norm = spec.norm and spec.norm.build(e)
        if spec.convolution:
            self.convolve = ShortConvolution(spec.convolution, 2 * H * d + H * e, rngs=rngs, bias=False)

    def read(self, x_BTD, context, starts, state, past):
        arrays = [self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)]
        if self.convolve is not None:
            x_BTE, past = self.convolve(jnp.concatenate(arrays, axis=-1), context.query.segment, past)
            arrays = jnp.split(x_BTE, [arrays[0].shape[-1], 2 * arrays[0].shape[-1]], axis=-1)
        query, key, value = (self.heads(activate(self.spec.activation, x)) for x in arrays)
        query, key = self.placed(query, context), self.placed(key, context)
        y_BHTe, state = self.recur(starts, query, key, value, x_BTD, context, state)
        return self.mixed(y_BHTe, x_BTD), state, past

    def placed(self, x_BHTd: jax.Array, context: Context) -> jax.Array:
        """Queries or keys, scaled and with positions applied."""
        x_BHTd = x_BHTd * jnp.asarray(x_BHTd.shape[-1] ** -0.25, x_BHTd.dtype)
        return self.rotated(x_BHTd, context)

    def rotated(self, x_BHTd: jax.Array, context: Context) -> jax.Array:
        """Queries or keys rotated by the position encoding, if `rotates` is set."""
        if not self.spec.rotates:
            return x_BHTd
        return self.encoding.rotate(x_BHTd, context.query.position, context.coordinate_BT3)

    def log_decay(self, x_BTD: jax.Array) -> jax.Array:
        """The log decay of the state at each position, float32 [B, H or 1, T, d or 1], at most 0."""
        return jnp.zeros((x_BTD.shape[0], 1, x_BTD.shape[1], 1), jnp.float32)

    def recur(self, starts, query_BHTd, key_BHTd, value_BHTe, x_BTD, context, state) -> tuple[jax.Array, Any]:
        """(outputs, float32 [B, H, T, e]; the new state)."""
        decay = self.log_decay(x_BTD)
        return linear_recurrence(starts, query_BHTd, key_BHTd, value_BHTe, decay, state, self.spec.chunk)

    def empty_state(self, batch_size: int) -> Any:
        width = self.dims.width
        shape = (batch_size, self.spec.heads, self.spec.width_of_head(width), self.spec.width_of_value(width))
        return jnp.zeros(shape, jnp.float32)

    def mixed(self, y_BHTe: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Normalises, gates and projects the outputs to [B, T, D]."""
        y_BTE = joined(y_BHTe if self.norm is None else self.norm(y_BHTe))
        if self.gate is not None:
            y_BTE = y_BTE * jax.nn.silu(self.gate(x_BTD).astype(jnp.float32))
        return self.output(y_BTE)

    def heads(self, x_BTE: jax.Array) -> jax.Array:
        """[B, T, H * c] -> [B, H, T, c]."""
        return x_BTE.reshape(*x_BTE.shape[:2], self.spec.heads, -1).transpose(0, 2, 1, 3)


def _with_whole_rows(x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Context]:
    """The same arrays, with positions not split over devices."""
    query = jax.tree.map(lambda x: constrain(x, "batch", None), context.query)
    coordinate_BT3 = context.coordinate_BT3
    if coordinate_BT3 is not None:
        coordinate_BT3 = constrain(coordinate_BT3, "batch", None, None)
    context = dataclasses.replace(context, query=query, coordinate_BT3=coordinate_BT3)
    return constrain(x_BTD, "batch", None, None), context


# --- the mask ---------------------------------------------------------------------------------------------------------

_PROBE = np.array([0, 1, 2, 5, 64, 1000, 1_000_000], np.int32)


def check_mask(name: str, mask: Mask) -> None:
    """Raises SpecError unless `mask`, outside bidirectional spans, shows exactly the earlier positions of a segment."""
    ahead, differs = _against_recurrence(mask)
    if ahead:
        raise SpecError(f"{name} reads a row in one direction, but {mask} looks both ways: use MultiHead here")
    if differs:
        raise SpecError(f"{name} sees all earlier positions of the example, but {mask} hides some: use MultiHead here")


@functools.cache
def _against_recurrence(mask: Mask) -> tuple[bool, bool]:
    """Whether the mask shows later positions, and whether it differs from what a recurrence sees.

    Evaluates the predicate on near and far positions of two segments and sixteen modalities, none in a span.
    """
    index, segment, modality = (x.reshape(-1) for x in np.meshgrid(_PROBE, np.int32([1, 2]), np.arange(16)))
    labels = {name: modality % 3 for name in mask.labels()}
    meta = Meta(index, index, segment, np.zeros_like(index), modality, labels)
    query, key = (jax.tree.map(lambda x, shape=shape: x.reshape(shape), meta) for shape in ((-1, 1), (1, -1)))
    with jax.ensure_compile_time_eval():
        shown = np.broadcast_to(np.asarray(mask(query, key)), (len(index), len(index)))
    same = query.segment == key.segment
    after = same & (key.index > query.index)
    return bool((shown & after).any()), bool((shown != (same & (key.index <= query.index))).any())
