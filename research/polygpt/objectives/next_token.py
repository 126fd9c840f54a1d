"""Cross entropy of the next token."""

import dataclasses

import jax

from polygpt.objectives.base import TokenObjective, TokenScores


@dataclasses.dataclass(frozen=True)
class NextToken(TokenObjective):
    """Cross entropy of the next token in nats, weighted by the loss weights (0 on prompts and padding)."""

    label_smoothing: float = 0.0
    """Fraction of the target probability spread evenly over the vocabulary (Szegedy et al. 2016, section 7)."""

    def validate(self):
        self.require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")

    @property
    def uses_mean(self) -> bool:
        return self.label_smoothing > 0

    def per_token(self, scores: TokenScores) -> jax.Array:
        loss = scores.log_z - (1 - self.label_smoothing) * scores.target
        return loss - self.label_smoothing * scores.mean if self.uses_mean else loss
