"""Consistency of predictions under dropout."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.base import Objective, require_hidden_targets
from polygpt.objectives.distillation import divergence
from polygpt.objectives.positions import log_probability, per_position
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class RDrop(Objective):
    """Divergence in nats between two passes with different dropout, the mean of both directions: Liang et al., R-Drop
    (2106.14448), equation 2. It is 0 without dropout."""

    second_pass: float = 0.0
    """Weight of the cross entropy of the second pass beside the divergence. 1 / alpha gives equation 4 of the paper, if
    alpha is the weight of this objective and `NextToken`, which has the first pass, has weight 1."""

    def validate(self):
        self.require(self.second_pass >= 0, "second_pass", "0 or above")

    @classmethod
    def small(cls) -> "RDrop":
        return cls(second_pass=1.0)  # without dropout nothing else is left

    def check_with(self, model, layout) -> None:
        require_hidden_targets(model)

    def total(self, outputs, batch: Batch) -> jax.Array:
        def compared(p_logits, q_logits, target):
            found = (divergence(p_logits, q_logits) + divergence(q_logits, p_logits)) / 2
            if self.second_pass == 0:
                return found
            return found - self.second_pass * log_probability(q_logits, target)

        passes = outputs, outputs.repeat(1)
        found_BT = per_position(compared, passes, batch.weight_BT != 0, batch.target_BT)
        return jnp.sum(batch.weight_BT * found_BT)
