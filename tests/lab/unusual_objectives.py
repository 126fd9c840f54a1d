"""Objectives that are right, and unlike those of the library. All of them are to pass `objective check`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from wrong_objectives import Masking, Right

from polygpt.api import Objective
from polygpt.objectives.base import BatchObjective, weighted_logits
from polygpt.objectives.needs import Needs


@dataclasses.dataclass(frozen=True)
class AfterNext(Right):
    """Scores the token after the next as well (2404.19737), by the same head."""

    def losses(self, outputs, batch):
        def ahead(x_BT, count):
            return jnp.pad(x_BT, ((0, 0), (0, count)))[:, count:]

        inside_BT = (ahead(batch.segment_BT, 2) == batch.segment_BT) & (ahead(batch.modality_BT, 2) == 0)
        log_p_BTV = jax.nn.log_softmax(weighted_logits(outputs, batch))
        after_BT1 = ahead(batch.target_BT, 1)[..., None]
        found_BT = jnp.take_along_axis(log_p_BTV, after_BT1, axis=-1)[..., 0]
        return super().losses(outputs, batch) - jnp.where(inside_BT, found_BT, 0)


@dataclasses.dataclass(frozen=True)
class Unlikelihood(Right):
    """Punishes the token that is read, as one not to repeat (1908.04319)."""

    def losses(self, outputs, batch):
        log_p_BTV = jax.nn.log_softmax(weighted_logits(outputs, batch))
        repeated_BT = jnp.take_along_axis(log_p_BTV, batch.tokens_BT[..., None], axis=-1)[..., 0]
        return super().losses(outputs, batch) - jnp.log1p(-jnp.exp(jnp.minimum(repeated_BT, -1e-3)))


@dataclasses.dataclass(frozen=True)
class SmallVectors(Objective):
    """The squared size of vectors at all real positions, whatever is scored."""

    def total(self, outputs, batch):
        real_BT1 = (batch.segment_BT > 0)[..., None]
        return jnp.sum(jnp.square(jnp.where(real_BT1, outputs.hidden_BTD.astype(jnp.float32), 0)))

    def weight(self, batch):
        return jnp.sum(batch.segment_BT > 0, dtype=jnp.float32)


class EveryThird(Masking):
    def chance(self, batch, keys_B):
        return jnp.where(batch.position_BT % 3 == 0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class MasksEveryThird(Right):
    """A view without chance."""

    @property
    def view(self):
        return EveryThird()


@dataclasses.dataclass(frozen=True)
class FromAverage(Right):
    """Learns from the moving average of the parameters."""

    @property
    def others(self):
        return ("average",)

    def losses(self, outputs, batch):
        p_BTV = jax.nn.softmax(weighted_logits(outputs.other("average"), batch))
        return -jnp.sum(p_BTV * jax.nn.log_softmax(weighted_logits(outputs, batch)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Spread(BatchObjective):
    """Keeps the examples of all rows apart: the mean similarity of their last vectors."""

    examples: int = 4
    """Maximum number per row."""

    def embed(self, outputs, batch):
        last_BT = (batch.segment_BT > 0) & (batch.segment_BT != jnp.pad(batch.segment_BT[:, 1:], ((0, 0), (0, 1))))
        here_BTS = last_BT[..., None] & (batch.segment_BT[..., None] == 1 + jnp.arange(self.examples)[None, None])
        vector_BTD = jnp.where(last_BT[..., None], outputs.hidden_BTD.astype(jnp.float32), 1)
        vector_BTD /= jnp.linalg.norm(vector_BTD, axis=-1, keepdims=True)
        return jnp.einsum("bts,btd->bsd", here_BTS.astype(jnp.float32), vector_BTD), here_BTS.any(axis=1).astype(
            jnp.float32
        )

    def compare(self, embedded):
        vector_BSD, valid_BS = embedded
        vector_ND, valid_N = vector_BSD.reshape(-1, vector_BSD.shape[-1]), valid_BS.ravel() > 0
        other_NN = valid_N[:, None] & valid_N[None] & ~jnp.eye(len(valid_N), dtype=bool)
        return jnp.sum(jnp.where(other_NN, jnp.exp(vector_ND @ vector_ND.T), 0)) / jnp.maximum(jnp.sum(valid_N) - 1, 1)

    def weight(self, batch):
        last_BT = (batch.segment_BT > 0) & (batch.segment_BT != jnp.pad(batch.segment_BT[:, 1:], ((0, 0), (0, 1))))
        return jnp.sum(last_BT, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class HalfHead(Objective):
    """A class of every example from its last vector, by part of the output head."""

    labels: int
    """Number of classes."""

    @classmethod
    def small(cls):
        return cls(5)

    @property
    def needs(self):
        def rows(batch, number_BT):
            last_BT = number_BT != np.pad(number_BT[:, 1:], ((0, 0), (0, 1)))
            label_BT = np.where(last_BT & (number_BT > 0), number_BT % self.labels, np.nan)
            return batch.replace(extra={"label": label_BT.astype(np.float32)})

        return Needs("labels", rows=rows)

    def total(self, outputs, batch):
        known_BT = ~jnp.isnan(batch.extra["label"])
        target_BT = jnp.where(known_BT, batch.extra["label"], 0).astype(jnp.int32)
        logits_BTK = jnp.where(known_BT[..., None], outputs.logits_BTV[..., : self.labels], 0)
        log_p_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTK), target_BT[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(known_BT, log_p_BT, 0))

    def weight(self, batch):
        return jnp.sum(~jnp.isnan(batch.extra["label"]), dtype=jnp.float32)
