"""Cross entropy that pays less attention to tokens that the model predicts well."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.base import TokenObjective, TokenScores


@dataclasses.dataclass(frozen=True)
class Focal(TokenObjective):
    """Focal loss -(1 - p)^gamma log p of the next token, in nats (Lin et al., 1708.02002, equation 4)."""

    gamma: float = 2.0
    """Exponent; 0 is the cross entropy."""

    def validate(self):
        # Between 0 and 1 the gradient is infinite where p is 1.
        self.require(self.gamma == 0 or self.gamma >= 1, "gamma", "0, or at least 1")

    def per_token(self, scores: TokenScores) -> jax.Array:
        log_p = scores.target - scores.log_z
        if self.gamma == 0:  # the power would have no gradient where p is 1
            return -log_p
        return -jnp.power(-jnp.expm1(log_p), self.gamma) * log_p
