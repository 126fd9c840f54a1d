"""Distillation from a teacher with another tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.objectives.cached import CachedDistillation, cached_log_p, span_ends, with_log_p
from polygpt.objectives.needs import Needs
from polygpt.objectives.positions import log_probability, per_position
from polygpt.sequence import Batch

CERTAIN = 1e-6
"""The student's divided log-probabilities count as at least this far below 0, which keeps the gradient finite."""


@dataclasses.dataclass(frozen=True)
class SpanDistillation(CachedDistillation):
    """Divergence in nats between the probabilities that teacher and student give to spans of bytes, between the token
    boundaries that their tokenizers share: approximate likelihood matching, Minixhofer et al. (2503.20083), section 3.
    Those of the teacher are written by `polygpt data score`."""

    temperature: float = 100.0
    """Divides both log-probabilities, without which long spans would have probabilities near 0, and multiplies the
    loss. For large ones the loss is half the square of the difference over the teacher's surprise."""

    @property
    def needs(self) -> Needs:
        def rows(batch: Batch, number_BT: np.ndarray) -> Batch:
            return with_log_p(batch, number_BT, self.scores, spans=True)

        return Needs(f"the scores {self.scores!r}", rows=rows)

    def total(self, outputs, batch: Batch) -> jax.Array:
        ends_BT, inside_BT = span_ends(batch, self.scores)
        token_BT = per_position(log_probability, (outputs,), inside_BT, batch.target_BT)
        own_BT = _running(token_BT, ends_BT)
        used_BT = ends_BT & (batch.weight_BT != 0)
        loss_BT = self._divergence(cached_log_p(batch, self.scores), jnp.where(used_BT, own_BT, -1.0))
        return jnp.sum(jnp.where(used_BT, batch.weight_BT * loss_BT, 0))

    def weight(self, batch: Batch) -> jax.Array:
        return jnp.sum(jnp.where(span_ends(batch, self.scores)[0], batch.weight_BT, 0), dtype=jnp.float32)

    def _divergence(self, teacher: jax.Array, student: jax.Array) -> jax.Array:
        """KL between two outcomes, the span or another one, with probabilities to the power 1 / temperature."""
        log_p = teacher / self.temperature
        log_q = jnp.minimum(student / self.temperature, -CERTAIN)
        rest = -jnp.expm1(log_p)
        log_rest = jnp.log(jnp.where(rest > 0, rest, 1))
        found = jnp.exp(log_p) * (log_p - log_q) + rest * (log_rest - jnp.log(-jnp.expm1(log_q)))
        return self.temperature * found


def _running(value_BT: jax.Array, ends_BT: jax.Array) -> jax.Array:
    """Sums over each span up to each of its positions; a span begins after the end of another one."""
    begins_BT = jnp.pad(ends_BT, ((0, 0), (1, 0)))[:, :-1]

    def add(before, after):
        return jnp.where(after[1], after[0], before[0] + after[0]), before[1] | after[1]

    return jax.lax.associative_scan(add, (value_BT, begins_BT), axis=1)[0]
