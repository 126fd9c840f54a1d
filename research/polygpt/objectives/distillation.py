"""Distillation: what a model learns from the predictions of another one, its teacher."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.objectives.base import Objective, require_blind, require_hidden_targets
from polygpt.objectives.positions import per_position
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """Kullback-Leibler divergence in nats between the softened predictions of teacher and student, times the square of
    the temperature: Hinton et al. (1503.02531), section 2. With `direction` "reverse", the student prefers what the
    teacher finds likely to covering all of it: Gu et al., MiniLLM (2306.08543), equation 1, here for each token of the
    data."""

    teacher: str = "teacher"
    """Its name in `references`; "average" for the moving average of the student's own parameters."""
    temperature: float = 1.0
    """Divides the logits of both models."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student). reverse: KL(student || teacher)."""

    def validate(self):
        self.require(self.temperature > 0, "temperature", "positive")

    @property
    def others(self) -> tuple[str, ...]:
        return (self.teacher,)

    def check_with(self, model, layout) -> None:
        require_hidden_targets(model)

    def check_other(self, other, model) -> None:
        require_blind(other, "it predicts for its student")

    def total(self, outputs, batch: Batch) -> jax.Array:
        passes = outputs.other(self.teacher), outputs
        if self.direction == "reverse":
            passes = passes[::-1]

        def softened(*logits):
            return divergence(*(x / self.temperature for x in logits))

        found_BT = per_position(softened, passes, batch.weight_BT != 0)
        return self.temperature**2 * jnp.sum(batch.weight_BT * found_BT)


def divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
    """KL(p || q) in nats over the last axis, which it removes."""
    log_p, log_q = (jax.nn.log_softmax(x, axis=-1) for x in (p_logits, q_logits))
    return jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p - log_q, 0), axis=-1)
