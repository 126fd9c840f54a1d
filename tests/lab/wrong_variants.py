"""Attention variants as a user might write them, each with one mistake. None of them is to pass `attention check`."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.api import Attention, MultiHead
from polygpt.attention import cache as memory
from polygpt.attention.masks import Causal, Mask, SameSegment, SameSpan, Window
from polygpt.attention.multi_head import MultiHeadModule
from polygpt.attention.scores import Score
from polygpt.nn.linear import Linear

# --- masks and scores -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OneAhead(Mask):
    """Up to the next position."""

    def __call__(self, query, key):
        return key.index <= query.index + 1


@dataclasses.dataclass(frozen=True)
class PeeksAhead(MultiHead):
    """An off-by-one in the mask."""

    def mask(self, mask):
        return SameSegment() & (OneAhead() | SameSpan())


@dataclasses.dataclass(frozen=True)
class LeaksAcross(MultiHead):
    """A mask of its own that forgets that rows are packed."""

    def mask(self, mask):
        return Causal() | SameSpan()


@dataclasses.dataclass(frozen=True)
class IgnoresSpans(MultiHead):
    """Causal, even inside a picture."""

    def mask(self, mask):
        return mask & Causal()


@dataclasses.dataclass(frozen=True)
class DistanceByIndex(Score):
    """ALiBi's penalty by the place in the row, padding included, instead of the position in the example."""

    def __call__(self, score, query, key, terms):
        return score - 0.3 * (query.index - key.index)


@dataclasses.dataclass(frozen=True)
class CountsPadding(MultiHead):
    """Distances grow by the padding in between."""

    def score(self, score):
        return super().score(score).then(DistanceByIndex())


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WrongCacheIndex(MultiHead):
    """A single new position is written over the one before it."""

    def build(self, dims, rngs):
        return WrongCacheIndexModule(self, dims, rngs)


class WrongCacheIndexModule(MultiHeadModule):
    def __call__(self, x_BTD, context, cache=None):
        if cache is not None and x_BTD.shape[1] == 1:
            context = dataclasses.replace(context, cursor=context.cursor - 1)
        return super().__call__(x_BTD, context, cache)


@dataclasses.dataclass(frozen=True)
class PositionOff(MultiHead):
    """While decoding, queries stand one position too far."""

    def build(self, dims, rngs):
        return PositionOffModule(self, dims, rngs)


class PositionOffModule(MultiHeadModule):
    def queries(self, x_BTD, context):
        query = context.query
        if x_BTD.shape[1] == 1:
            query = dataclasses.replace(query, position=query.position + 1)
        return super().queries(x_BTD, dataclasses.replace(context, query=query))


@dataclasses.dataclass(frozen=True)
class RingTooSmall(MultiHead):
    """Sees eight positions and remembers six."""

    def mask(self, mask):
        return mask & Window(8)

    def init_cache(self, dims, rows, size, ring=True):
        arrays = super().init_cache(dims, rows, 1, False).arrays
        return memory.empty(arrays, size, Window(6), ring)


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NotANumber(MultiHead):
    """Results of unit length: 0 / 0 where nothing is seen."""

    def build(self, dims, rngs):
        return NotANumberModule(self, dims, rngs)


class NotANumberModule(MultiHeadModule):
    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        y_BHTe = y_BHTe / jnp.linalg.norm(y_BHTe, axis=-1, keepdims=True)
        return super().mixed(y_BHTe, lse_BHT, x_BTD, context)


@dataclasses.dataclass(frozen=True)
class UnitQueries(MultiHead):
    """Queries of unit length: 0 / 0 at padding, where a model has vectors of zeros."""

    def build(self, dims, rngs):
        return UnitQueriesModule(self, dims, rngs)


class UnitQueriesModule(MultiHeadModule):
    def queries(self, x_BTD, context):
        q_BHTd = super().queries(x_BTD, context)
        return q_BHTd / jnp.linalg.norm(q_BHTd, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class DependsOnBackend(MultiHead):
    """Scales queries for one of the backends."""

    def build(self, dims, rngs):
        return DependsOnBackendModule(self, dims, rngs)


class DependsOnBackendModule(MultiHeadModule):
    def attend(self, rule, operands):
        if self.spec.backend == "chunked":
            operands = dataclasses.replace(operands, query_BHTd=operands.query_BHTd * 1.01)
        return super().attend(rule, operands)


@dataclasses.dataclass(frozen=True)
class Rounds(MultiHead):
    """Queries in steps of 1/4: the gradient is zero where it exists."""

    def build(self, dims, rngs):
        return RoundsModule(self, dims, rngs)


class RoundsModule(MultiHeadModule):
    def queries(self, x_BTD, context):
        return jnp.round(4 * super().queries(x_BTD, context)) / 4


@dataclasses.dataclass(frozen=True)
class StopsGradient(MultiHead):
    """Keys do not learn."""

    def build(self, dims, rngs):
        return StopsGradientModule(self, dims, rngs)


class StopsGradientModule(MultiHeadModule):
    def keys(self, x_BTD, context):
        return jax.lax.stop_gradient(super().keys(x_BTD, context))


@dataclasses.dataclass(frozen=True)
class MixesRows(MultiHead):
    """Values are moved towards their mean over the batch."""

    def build(self, dims, rngs):
        return MixesRowsModule(self, dims, rngs)


class MixesRowsModule(MultiHeadModule):
    def values(self, x_BTD, context):
        values_BKTe = super().values(x_BTD, context)
        return values_BKTe - values_BKTe.mean(axis=0, keepdims=True) / 2


@dataclasses.dataclass(frozen=True)
class ReturnsFloat32(MultiHead):
    """The result is float32 whatever the model computes in."""

    def build(self, dims, rngs):
        return ReturnsFloat32Module(self, dims, rngs)


class ReturnsFloat32Module(MultiHeadModule):
    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        return super().mixed(y_BHTe, lse_BHT, x_BTD, context).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Crashes(MultiHead):
    """Fails as soon as a position comes alone."""

    def build(self, dims, rngs):
        return CrashesModule(self, dims, rngs)


class CrashesModule(MultiHeadModule):
    def __call__(self, x_BTD, context, cache=None):
        if x_BTD.shape[1] == 1:
            raise KeyError("no such\nthing")
        return super().__call__(x_BTD, context, cache)


# --- a state ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decaying(Attention):
    """y_t = W sum_s decay^(t-s) V x_s: nothing is wrong with it unless a field says so."""

    family = "linear"

    decay: float = 0.8
    """How much of the state is left after a position."""
    forgets: bool = True
    """Whether the state begins anew with every packed example."""
    skips: bool = True
    """Whether the state stands still at padding."""

    def build(self, dims, rngs):
        return DecayingModule(self, dims, rngs)

    def init_cache(self, dims, rows, size, ring=True):
        return jnp.zeros((rows, dims.width)), jnp.zeros((rows,), jnp.int32)

    def score_flops(self, width, keys):
        return 2 * width

    def cost(self):
        return "2 D"


class DecayingModule(nnx.Module):
    def __init__(self, spec, dims, rngs):
        self.spec, self.dims = spec, dims
        self.value = Linear(dims.width, dims.width, rngs=rngs, bias=False, dtype=dims.dtype)
        self.output = Linear(dims.width, dims.width, rngs=rngs, bias=False, dtype=dims.dtype)

    def __call__(self, x_BTD, context, cache=None):
        def step(carry, now):
            state_BD, last_B = carry
            value_BD, segment_B = now
            real_B1 = (segment_B > 0)[:, None]
            if self.spec.forgets:
                state_BD = jnp.where(real_B1 & (segment_B != last_B)[:, None], 0.0, state_BD)
            new_BD = self.spec.decay * state_BD + value_BD.astype(state_BD.dtype)
            if self.spec.skips:
                new_BD = jnp.where(real_B1, new_BD, state_BD)
            return (new_BD, jnp.where(segment_B > 0, segment_B, last_B)), new_BD

        columns = self.values(x_BTD).swapaxes(0, 1), context.query.segment.swapaxes(0, 1)
        start = self.spec.init_cache(self.dims, x_BTD.shape[0], 1) if cache is None else cache
        end, state_TBD = jax.lax.scan(step, start, columns)
        return self.output(self.read(state_TBD).swapaxes(0, 1).astype(x_BTD.dtype)), None if cache is None else end

    def values(self, x_BTD):
        return self.value(x_BTD)

    def read(self, state_TBD):
        return state_TBD


@dataclasses.dataclass(frozen=True)
class CarriesState(Decaying):
    """A recurrence that goes on from one packed example into the next."""

    forgets: bool = False
    """As of the base."""


@dataclasses.dataclass(frozen=True)
class ReadsPadding(Decaying):
    """A recurrence into which padding is read."""

    skips: bool = False
    """As of the base."""


@dataclasses.dataclass(frozen=True)
class OneAheadInSpans(Decaying):
    """In a span a position sees the next one, and not the rest."""

    def sees_ahead(self):
        return True

    def build(self, dims, rngs):
        return OneAheadInSpansModule(self, dims, rngs)


class OneAheadInSpansModule(DecayingModule):
    def __call__(self, x_BTD, context, cache=None):
        y_BTD, cache = super().__call__(x_BTD, context, cache)
        span_BT = context.query.span
        next_BT = jnp.roll(span_BT, -1, axis=1).at[:, -1].set(0)
        same_BT1 = ((span_BT == next_BT) & (span_BT > 0))[..., None]
        return y_BTD + jnp.where(same_BT1, self.value(jnp.roll(x_BTD, -1, axis=1)), 0), cache
