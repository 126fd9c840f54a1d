"""Variants with mistakes that short rows, one size of arrays, as many key heads as heads, and Rope do not show."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from wrong_variants import Decaying, DecayingModule

from polygpt.api import MultiHead, Score
from polygpt.attention.kernels import reference
from polygpt.attention.multi_head import MultiHeadModule
from polygpt.attention.scores import Terms
from polygpt.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class SharperInLongArrays(MultiHead):
    """Queries grow with the logarithm of how many keys the array has, padding and what is not yet written included."""

    def build(self, dims, rngs):
        return SharperInLongArraysModule(self, dims, rngs)


class SharperInLongArraysModule(MultiHeadModule):
    def attend(self, rule, operands):
        factor = math.log(operands.key_BKSd.shape[2]) / math.log(24)
        return super().attend(rule, dataclasses.replace(operands, query_BHTd=operands.query_BHTd * factor))


@dataclasses.dataclass(frozen=True)
class ClampedPositions(MultiHead):
    """Angles come from a table for 64 positions; later ones have that of the last."""

    def build(self, dims, rngs):
        return ClampedPositionsModule(self, dims, rngs)


class ClampedPositionsModule(MultiHeadModule):
    def _placed(self, x_BHTd, norm, context):
        return self.spec.encoding(self.dims).rotate(x_BHTd, jnp.minimum(context.query.position, 63))


@dataclasses.dataclass(frozen=True)
class ForgetsToRescale(MultiHead):
    """Whole rows are computed in blocks of 64 keys, and the sum of the first block is not rescaled to the second's."""

    def build(self, dims, rngs):
        return ForgetsToRescaleModule(self, dims, rngs)


class ForgetsToRescaleModule(MultiHeadModule):
    def attend(self, rule, operands):
        if operands.query_BHTd.shape[2] == 1:
            return super().attend(rule, operands)
        score_BHTS, visible_B1TS = reference.masked_scores(rule, operands)
        weights_BHTS = reference.normalized(rule, score_BHTS, visible_B1TS)
        late = (jnp.arange(score_BHTS.shape[-1]) >= 64)[None, None, None]
        top_BHT1 = score_BHTS.max(-1, keepdims=True)
        first_BHT1 = jnp.where(late, -1e9, score_BHTS).max(-1, keepdims=True)
        weights_BHTS = weights_BHTS * jnp.where(late, 1, jnp.exp(jnp.minimum(top_BHT1 - first_BHT1, 1.0)))
        y_BHTe = reference.weighted_values(weights_BHTS, operands.value_BKSe)
        return y_BHTe, jax.nn.logsumexp(score_BHTS, axis=-1)

    def weigh(self, rule, operands):
        return reference.attention_weights(rule, operands)


@dataclasses.dataclass(frozen=True)
class TiledHeads(MultiHead):
    """Single positions see key heads in the order 0 1 0 1 instead of 0 0 1 1."""

    def build(self, dims, rngs):
        return TiledHeadsModule(self, dims, rngs)


class TiledHeadsModule(MultiHeadModule):
    def attend(self, rule, operands):
        times = operands.query_BHTd.shape[1] // operands.key_BKSd.shape[1]
        if operands.query_BHTd.shape[2] == 1:
            key, value = (jnp.tile(x, (1, times, 1, 1)) for x in (operands.key_BKSd, operands.value_BKSe))
            operands = dataclasses.replace(operands, key_BKSd=key, value_BKSe=value)
        return super().attend(rule, operands)


@dataclasses.dataclass(frozen=True)
class OtherPictures(MultiHead):
    """Attends twice as sharply as the weights that it shows."""

    def build(self, dims, rngs):
        return OtherPicturesModule(self, dims, rngs)


class OtherPicturesModule(MultiHeadModule):
    def attend(self, rule, operands):
        return super().attend(rule, dataclasses.replace(operands, query_BHTd=operands.query_BHTd * 2))


@dataclasses.dataclass(frozen=True)
class NeverLearns(MultiHead):
    """A bias of values is a parameter that nothing reads."""

    def build(self, dims, rngs):
        return NeverLearnsModule(self, dims, rngs)


class NeverLearnsModule(MultiHeadModule):
    def project(self, rngs):
        super().project(rngs)
        self.forgotten = nnx.Param(jnp.ones(self.dims.width))


@dataclasses.dataclass(frozen=True)
class Gate(Score):
    """Adds a term of the key, by the name that the module below gives it."""

    def __call__(self, score, query, key, terms):
        return score + terms.key["gate"]


@dataclasses.dataclass(frozen=True)
class NamesTermsItself(MultiHead):
    """Makes terms by its own module, and not by the score that reads them: with a second score their names differ."""

    def score(self, score):
        return super().score(score).then(Gate())

    def build(self, dims, rngs):
        return NamesTermsItselfModule(self, dims, rngs)


class NamesTermsItselfModule(MultiHeadModule):
    def project(self, rngs):
        super().project(rngs)
        self.gate = Linear(self.dims.width, self.spec.heads, rngs=rngs, bias=False, dtype="float32")

    def _terms(self, x_BTD, context):
        return Terms(key={"gate": self.gate(x_BTD).swapaxes(1, 2)})


@dataclasses.dataclass(frozen=True)
class SumsInBfloat16(Decaying):
    """y_t = W mean of V x_s over s <= t, summed position by position in the model's dtype."""

    decay: float = 1.0
    """Nothing is forgotten."""
    wide: bool = False
    """Whether the sum is kept in float32, as is right."""

    def build(self, dims, rngs):
        return SumsInBfloat16Module(self, dims, rngs)

    def init_cache(self, dims, rows, size, ring=True):
        dtype = "float32" if self.wide else dims.dtype
        return jnp.zeros((rows, dims.width + 1), dtype), jnp.zeros((rows,), jnp.int32)


class SumsInBfloat16Module(DecayingModule):
    """Sums a one beside the values, by which it divides."""

    def values(self, x_BTD):
        value_BTD = super().values(x_BTD)
        return jnp.concatenate([value_BTD, jnp.ones_like(value_BTD[..., :1])], axis=-1)

    def read(self, state_TBE):
        return state_TBE[..., :-1] / jnp.maximum(state_TBE[..., -1:], 1)
