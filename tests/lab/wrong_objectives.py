"""Objectives as a user might write them, each with one mistake. None of them is to pass `objective check`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.api import Objective
from polygpt.objectives.base import BatchObjective, TokenObjective, weighted_logits
from polygpt.objectives.view import View, uniform

MASK = 300


def cross_entropy(logits_BTV, target_BT):
    at_target_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - at_target_BT


@dataclasses.dataclass(frozen=True)
class Right(Objective):
    """The cross entropy of the next token; what follows changes one thing in it."""

    def losses(self, outputs, batch):
        return cross_entropy(weighted_logits(outputs, batch), batch.target_BT)

    def total(self, outputs, batch):
        return jnp.sum(batch.weight_BT * self.losses(outputs, batch))


# --- leaks ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReadsNextVector(Right):
    """Off by one: the logits of the next position, which has read the target."""

    def losses(self, outputs, batch):
        return cross_entropy(jnp.roll(outputs.logits_BTV, -1, axis=1), batch.target_BT)


@dataclasses.dataclass(frozen=True)
class ReadsShifted(Right):
    """A second pass over tokens that are one place too early."""

    def losses(self, outputs, batch):
        shifted = batch.replace(tokens_BT=jnp.roll(batch.tokens_BT, -1, axis=1))
        return super().losses(outputs.over(shifted), batch)


@dataclasses.dataclass(frozen=True)
class ReadsWithoutGradient(Right):
    """The next position decides how much a token counts, without a gradient."""

    def losses(self, outputs, batch):
        ahead_BTD = jax.lax.stop_gradient(jnp.roll(outputs.hidden_BTD, -1, axis=1))
        return super().losses(outputs, batch) * jax.nn.sigmoid(jnp.sum(ahead_BTD, axis=-1))


@dataclasses.dataclass(frozen=True)
class ReadsNextResidual(Right):
    """The next position decides by what it has inside the model."""

    @property
    def captures(self):
        return {"": ("residual",)}

    def losses(self, outputs, batch):
        ahead_BTD = jnp.roll(outputs.captured("residual")[0], -1, axis=1)
        return super().losses(outputs, batch) * jax.nn.sigmoid(jnp.sum(ahead_BTD, axis=-1))


@dataclasses.dataclass(frozen=True)
class ForgetsShift(Right):
    """Predicts the token that is read."""

    def losses(self, outputs, batch):
        return cross_entropy(weighted_logits(outputs, batch), batch.tokens_BT)


@dataclasses.dataclass(frozen=True)
class Unweighted(Right):
    """Predicts the next token at all positions, whatever their weight. Right, but for what follows."""

    def target(self, batch):
        return jnp.roll(batch.tokens_BT, -1, axis=1)

    def logits(self, outputs, batch):
        return outputs.logits_BTV

    def scored(self, batch):
        return (batch.segment_BT > 0) & (batch.segment_BT == jnp.roll(batch.segment_BT, -1, axis=1))

    def total(self, outputs, batch):
        scored_BT = self.scored(batch)
        logits_BTV = jnp.where(scored_BT[..., None], self.logits(outputs, batch), 0)
        return jnp.sum(jnp.where(scored_BT, cross_entropy(logits_BTV, self.target(batch)), 0))

    def weight(self, batch):
        return jnp.sum(self.scored(batch), dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class UnweightedAndUnshifted(Unweighted):
    """Predicts the token that is read, at all positions."""

    def target(self, batch):
        return batch.tokens_BT


@dataclasses.dataclass(frozen=True)
class UnweightedAndAhead(Unweighted):
    """The logits of the next position, which has read the target, at all positions."""

    def logits(self, outputs, batch):
        return jnp.roll(outputs.logits_BTV, -1, axis=1)


@dataclasses.dataclass(frozen=True)
class UnweightedShiftedPass(Unweighted):
    """A second pass over tokens that are one place too early, at all positions, and the mean of both."""

    def logits(self, outputs, batch):
        shifted = batch.replace(tokens_BT=jnp.roll(batch.tokens_BT, -1, axis=1))
        return (outputs.logits_BTV + outputs.over(shifted).logits_BTV) / 2


@dataclasses.dataclass(frozen=True)
class PartUnweighted(Right):
    """The cross entropy, which is right, and a little of one that ignores the weights and reads the target."""

    def total(self, outputs, batch):
        return super().total(outputs, batch) + 0.1 * UnweightedAndUnshifted().total(outputs, batch)


@dataclasses.dataclass(frozen=True)
class Masking(View):
    """Masks a third of the tokens with a weight; every position sees its whole example."""

    def chance(self, batch, keys_B):
        return uniform(keys_B, batch.shape[1])

    def replacement(self, batch):
        return MASK

    def __call__(self, batch, keys_B):
        weight_BT = jnp.pad(batch.weight_BT, ((0, 0), (1, 0)))[:, :-1]
        chosen_BT = (self.chance(batch, keys_B) < 0.35) & (weight_BT != 0)
        return batch.replace(
            tokens_BT=jnp.where(chosen_BT, self.replacement(batch), batch.tokens_BT),
            span_BT=(batch.segment_BT > 0).astype(batch.span_BT.dtype),
            target_BT=batch.tokens_BT,
            weight_BT=jnp.where(chosen_BT, weight_BT, 0.0),
        )


@dataclasses.dataclass(frozen=True)
class Masked(Right):
    """Masked language modelling, which is right."""

    @property
    def view(self):
        return Masking()


class Visible(Masking):
    def replacement(self, batch):
        return batch.tokens_BT


@dataclasses.dataclass(frozen=True)
class MasksNothing(Masked):
    """Predicts tokens that are in place."""

    @property
    def view(self):
        return Visible()


class Telling(Masking):
    def replacement(self, batch):
        return MASK + batch.tokens_BT % 2


@dataclasses.dataclass(frozen=True)
class MaskTells(Masked):
    """Another mask for odd tokens than for even ones."""

    @property
    def view(self):
        return Telling()


@dataclasses.dataclass(frozen=True)
class UnweightedMaskTells(Unweighted):
    """The same, and it scores what is masked, whatever its weight."""

    @property
    def view(self):
        return Telling()

    def target(self, batch):
        return batch.target_BT

    def scored(self, batch):
        return batch.tokens_BT >= MASK


class Crossing(Masking):
    def replacement(self, batch):
        return jnp.broadcast_to(batch.tokens_BT[:, :1], batch.shape)


@dataclasses.dataclass(frozen=True)
class ViewCrosses(Masked):
    """Masks with a token of the row's first example."""

    @property
    def view(self):
        return Crossing()


class FromHost(Masking):
    def chance(self, batch, keys_B):
        return jnp.asarray(np.random.default_rng().random(batch.shape))


@dataclasses.dataclass(frozen=True)
class ViewFromHost(Masked):
    """Random numbers of NumPy, drawn when the program is traced."""

    @property
    def view(self):
        return FromHost()


class ByPlace(Masking):
    def chance(self, batch, keys_B):
        place_B = jnp.arange(batch.shape[0])
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(keys_B[0], i), batch.shape[1:]))(place_B)


@dataclasses.dataclass(frozen=True)
class ViewByPlace(Masked):
    """Depends on the row's place in the rows that one device has."""

    @property
    def view(self):
        return ByPlace()


class Constant(Masking):
    def chance(self, batch, keys_B):
        return jnp.broadcast_to(jax.random.uniform(jax.random.key(0), batch.shape[1:]), batch.shape)


@dataclasses.dataclass(frozen=True)
class ViewOfOneStep(Masked):
    """The same view at every step."""

    @property
    def view(self):
        return Constant()


class Padded(View):
    def __call__(self, batch, keys_B):
        return batch.replace(weight_BT=jnp.ones_like(batch.weight_BT))


@dataclasses.dataclass(frozen=True)
class WeighsPadding(Right):
    """A view that breaks the layout."""

    @property
    def view(self):
        return Padded()


# --- sums and weights -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeanForSum(Right):
    """A mean, and the sum of the weights as its divisor."""

    def total(self, outputs, batch):
        return super().total(outputs, batch) / jnp.sum(batch.weight_BT)


@dataclasses.dataclass(frozen=True)
class MeanOfMeans(MeanForSum):
    """A mean, divided by one: each microbatch and device normalises on its own."""

    def weight(self, batch):
        return jnp.ones(())


@dataclasses.dataclass(frozen=True)
class IgnoresWeights(Right):
    """Scores prompts too."""

    def total(self, outputs, batch):
        real_BT = batch.segment_BT > 0
        return jnp.sum(jnp.where(real_BT, cross_entropy(outputs.logits_BTV, batch.target_BT), 0))

    def weight(self, batch):
        return jnp.sum(batch.segment_BT > 0, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class WeightOfOutputs(Right):
    """Weighs tokens by how surprised the model is, and divides by the sum."""

    def total(self, outputs, batch):
        losses_BT = self.losses(outputs, batch)
        doubt_BT = batch.weight_BT * jax.lax.stop_gradient(losses_BT)
        return jnp.sum(doubt_BT * losses_BT) / jnp.sum(doubt_BT) * self.weight(batch)


@dataclasses.dataclass(frozen=True)
class NotANumberTimesZero(Right):
    """Multiplies what is infinite at padding by 0."""

    def losses(self, outputs, batch):
        return cross_entropy(outputs.logits_BTV, batch.target_BT)


@dataclasses.dataclass(frozen=True)
class WhereAfterwards(NotANumberTimesZero):
    """Leaves padding out of the sum, but not out of the gradient."""

    def total(self, outputs, batch):
        losses_BT = self.losses(outputs, batch)
        return jnp.sum(jnp.where(batch.weight_BT != 0, batch.weight_BT * losses_BT, 0))


@dataclasses.dataclass(frozen=True)
class NoWeightNoNumber(Right):
    """0 / 0 without any weight."""

    def total(self, outputs, batch):
        share_BT = batch.weight_BT / jnp.sum(batch.weight_BT)
        return jnp.sum(share_BT * self.losses(outputs, batch)) * jnp.sum(batch.weight_BT)


@dataclasses.dataclass(frozen=True)
class CrossesExamples(Right):
    """Takes off what the position before says, whichever example it is of."""

    def losses(self, outputs, batch):
        before_BT = jnp.pad(jax.nn.logsumexp(outputs.logits_BTV, axis=-1), ((0, 0), (1, 0)))[:, :-1]
        return super().losses(outputs, batch) - before_BT


@dataclasses.dataclass(frozen=True)
class ComparesMicrobatch(Right):
    """Compares rows, but is no BatchObjective."""

    def total(self, outputs, batch):
        rows_B = jnp.sum(batch.weight_BT * self.losses(outputs, batch), axis=1)
        return jnp.sum(rows_B) + jnp.sum(jnp.square(rows_B[:, None] - rows_B[None])) / 1e3


@dataclasses.dataclass(frozen=True)
class EmbedsByMean(BatchObjective):
    """Compares rows, which it centres by the mean of those that one device has."""

    def embed(self, outputs, batch):
        used_BT1 = (batch.weight_BT != 0)[..., None]
        rows_BD = jnp.sum(jnp.where(used_BT1, outputs.hidden_BTD.astype(jnp.float32), 0), axis=1)
        return rows_BD - jnp.mean(rows_BD, axis=0, keepdims=True)

    def compare(self, embedded):
        return jnp.sum(jnp.square(embedded))


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LogOfProbability(Right):
    """The logarithm of a probability that may be 0."""

    def losses(self, outputs, batch):
        p_BTV = jax.nn.softmax(weighted_logits(outputs, batch))
        return -jnp.log(jnp.take_along_axis(p_BTV, batch.target_BT[..., None], axis=-1)[..., 0])


@dataclasses.dataclass(frozen=True)
class Overflows(Right):
    """Exponentials of logits."""

    def losses(self, outputs, batch):
        logits_BTV = weighted_logits(outputs, batch)
        at_target_BT = jnp.take_along_axis(logits_BTV, batch.target_BT[..., None], axis=-1)[..., 0]
        return jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1)) - at_target_BT


@dataclasses.dataclass(frozen=True)
class SumsInComputeType(Right):
    """Adds up small terms, one after the other, in the dtype of the model."""

    def total(self, outputs, batch):
        terms_BT = batch.weight_BT * self.losses(outputs, batch)
        terms_N = jnp.tile(terms_BT.ravel() / 8, 8).astype(outputs.hidden_BTD.dtype)
        total = jax.lax.scan(lambda total, term: (total + term, None), jnp.zeros_like(terms_N[0]), terms_N)[0]
        return total.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class InHalf(Right):
    """Returns float16."""

    def total(self, outputs, batch):
        return super().total(outputs, batch).astype(jnp.float16)


@jax.custom_vjp
def doubled(x):
    """x, with a gradient twice as large."""
    return x


doubled.defvjp(lambda x: (x, None), lambda _, gradient: (2 * gradient,))


@dataclasses.dataclass(frozen=True)
class WrongGradient(Right):
    """A gradient of its own."""

    def losses(self, outputs, batch):
        return doubled(super().losses(outputs, batch))


@dataclasses.dataclass(frozen=True)
class RandomTotal(Right):
    """Random when traced."""

    def total(self, outputs, batch):
        return super().total(outputs, batch) * np.random.default_rng().uniform(0.5, 1.5)


@dataclasses.dataclass(frozen=True)
class CountsPositions(TokenObjective):
    """A loss per token that depends on how many positions it is given."""

    def per_token(self, scores):
        return (scores.log_z - scores.target) * scores.log_z.size


@dataclasses.dataclass(frozen=True)
class HoldsFunction(Right):
    """A field that no file can hold."""

    function: Any = abs
    """Applied to the losses."""

    def losses(self, outputs, batch):
        return self.function(super().losses(outputs, batch))


@dataclasses.dataclass(frozen=True)
class Undeclared(Right):
    """Reads a model that it does not name."""

    def losses(self, outputs, batch):
        return super().losses(outputs.other("teacher"), batch)


@dataclasses.dataclass(frozen=True)
class Crashes(Right):
    """Has a mistake that Python finds."""

    def losses(self, outputs, batch):
        return outputs.logits_BTX
