"""Consistency of predictions under dropout and noise."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.base import Objective, require_hidden_targets
from polygpt.objectives.distillation import divergence
from polygpt.objectives.positions import log_probability, per_position
from polygpt.objectives.view import View, uniform
from polygpt.sequence import TEXT, Batch

CLEAN = "tokens_without_noise"
"""Name in `Batch.extra` of the tokens before noise, int32 [B, T]."""


@dataclasses.dataclass(frozen=True)
class NoisyTokens(View):
    """Replaces some tokens that the model reads by random ones; targets stay as they are."""

    vocabulary: int
    """Ids below this one are drawn."""
    rate: float = 0.1
    """Fraction of tokens that are replaced."""

    def validate(self):
        self.require(self.vocabulary >= 1, "vocabulary", "at least 1")
        self.require(0 < self.rate <= 1, "rate", "above 0, at most 1")

    def __call__(self, batch: Batch, keys_B: jax.Array) -> Batch:
        chance_BT, token_BT = jnp.moveaxis(uniform(keys_B, 2, batch.shape[1]), 1, 0)
        random_BT = jnp.minimum(jnp.floor(token_BT * self.vocabulary), self.vocabulary - 1)
        replaced_BT = (chance_BT < self.rate) & (batch.modality_BT == TEXT)
        tokens_BT = jnp.where(replaced_BT, random_BT.astype(batch.tokens_BT.dtype), batch.tokens_BT)
        return batch.replace(tokens_BT=tokens_BT, extra=batch.extra | {CLEAN: batch.tokens_BT})


@dataclasses.dataclass(frozen=True)
class RDrop(Objective):
    """Divergence in nats between two passes with different dropout, the mean of both directions: Liang et al., R-Drop
    (2106.14448), equation 2. With `noise` the second pass reads other tokens too. Without both it is 0."""

    second_pass: float = 0.0
    """Weight of the cross entropy of the second pass beside the divergence. 1 / alpha gives equation 4 of the paper, if
    alpha is the weight of this objective and `NextToken`, which has the first pass, has weight 1."""

    noise: NoisyTokens | None = None
    """What the second pass reads instead of some tokens; null for nothing. The first pass is then a third one, if
    `NextToken` has one of its own."""

    def validate(self):
        self.require(self.second_pass >= 0, "second_pass", "0 or above")

    @classmethod
    def small(cls) -> "RDrop":
        return cls(second_pass=1.0)  # without dropout nothing else is left

    @property
    def view(self) -> NoisyTokens | None:
        return self.noise

    def check_with(self, model, layout) -> None:
        require_hidden_targets(model)

    def total(self, outputs, batch: Batch) -> jax.Array:
        def compared(p_logits, q_logits, target):
            found = (divergence(p_logits, q_logits) + divergence(q_logits, p_logits)) / 2
            if self.second_pass == 0:
                return found
            return found - self.second_pass * log_probability(q_logits, target)

        first = outputs if self.noise is None else outputs.over(batch.replace(tokens_BT=batch.extra[CLEAN]))
        passes = first, outputs.repeat(1)
        found_BT = per_position(compared, passes, batch.weight_BT != 0, batch.target_BT)
        return jnp.sum(batch.weight_BT * found_BT)
