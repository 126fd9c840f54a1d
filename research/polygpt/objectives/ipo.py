"""Identity preference optimization."""

import dataclasses

import jax.numpy as jnp

from polygpt.objectives.preference import PreferenceObjective


@dataclasses.dataclass(frozen=True)
class IPO(PreferenceObjective):
    """Identity preference optimization: Azar et al. (2310.12036), equation 17. The margin between the answers is driven
    to 1 / (2 beta) and not beyond."""

    beta: float = 0.1
    """Strength of the penalty on leaving the reference (tau in the paper)."""
    per_token: bool = False
    """Whether to score answers by the mean over their tokens, as TRL does, and not by the sum."""

    def validate(self):
        self.require(self.beta > 0, "beta", "positive")

    def per_pair(self, own, reference):
        def gap(pairs):
            return pairs.mean_chosen - pairs.mean_rejected if self.per_token else pairs.chosen - pairs.rejected

        log_ratio = gap(own) if reference is None else gap(own) - gap(reference)
        return jnp.square(log_ratio - 1 / (2 * self.beta))
