"""Distillation from cached top-k log-probabilities of a teacher."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.objectives.cached import CachedDistillation, cached_top, with_top
from polygpt.objectives.needs import Needs
from polygpt.objectives.positions import per_position
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class TopKDistillation(CachedDistillation):
    """Kullback-Leibler divergence in nats of the student from the k most likely tokens of a teacher, as `polygpt data
    score --top` wrote them. Those alone are a biased teacher (Anshumann et al., 2503.16870), hence `remainder`. With
    all tokens it is `Distillation`."""

    temperature: float = 1.0
    """Divides the logits of both models; the loss is multiplied by its square: Hinton et al. (1503.02531), section 2.
    """
    remainder: Literal["bucket", "renormalised"] = "bucket"
    """The probability of all other tokens. bucket: it is one more outcome, for both models (the "ghost token" of
    2503.16870). renormalised: the teacher's k probabilities are divided by their sum (Peng et al., 2410.16215)."""

    def validate(self):
        super().validate()
        # The softened probability of the other tokens cannot be computed from their sum.
        fits = self.temperature == 1 or self.remainder == "renormalised"
        self.require(fits, "remainder", "renormalised with a temperature other than 1")

    @property
    def needs(self) -> Needs:
        def rows(batch: Batch, number_BT: np.ndarray) -> Batch:
            return with_top(batch, number_BT, self.scores)

        return Needs(f"the scores {self.scores!r} with --top", rows=rows)

    def total(self, outputs, batch: Batch) -> jax.Array:
        ids_BTk, log_p_BTk, known_BT = cached_top(batch, self.scores)
        used_BT = known_BT & (batch.weight_BT != 0)
        found_BT = per_position(self._divergence, (outputs,), used_BT, ids_BTk, log_p_BTk)
        return self.temperature**2 * jnp.sum(batch.weight_BT * found_BT)

    def weight(self, batch: Batch) -> jax.Array:
        *_, known_BT = cached_top(batch, self.scores)
        return jnp.sum(jnp.where(known_BT, batch.weight_BT, 0), dtype=jnp.float32)

    def _divergence(self, logits: jax.Array, ids: jax.Array, log_p: jax.Array) -> jax.Array:
        log_q = jax.nn.log_softmax(logits / self.temperature)
        whole = ids.shape[-1] == logits.shape[-1]
        if self.remainder == "renormalised" or whole:
            log_p = jax.nn.log_softmax(log_p / self.temperature)
        p = jnp.exp(log_p)
        found = jnp.sum(p * (jnp.where(p > 0, log_p, 0) - jnp.take_along_axis(log_q, ids, axis=-1)), axis=-1)
        if self.remainder == "renormalised" or whole:
            return found
        rest = jnp.maximum(1 - jnp.sum(p, axis=-1), 0)
        others = jnp.put_along_axis(log_q, ids, -jnp.inf, axis=-1, inplace=False)
        log_rest = jnp.log(jnp.where(rest > 0, rest, 1))
        return found + rest * (log_rest - jax.nn.logsumexp(others, axis=-1))
