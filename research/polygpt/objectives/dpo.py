"""Direct preference optimization."""

import dataclasses

import jax

from polygpt.objectives.preference import PreferenceObjective, margin


@dataclasses.dataclass(frozen=True)
class DPO(PreferenceObjective):
    """Direct preference optimization: Rafailov et al. (2305.18290), equation 7. With `label_smoothing`, conservative
    DPO: Mitchell (2023), "A note on DPO with noisy preferences", equation 3."""

    beta: float = 0.1
    """Strength of the penalty on leaving the reference; the loss has the scale of log-probabilities times beta."""
    label_smoothing: float = 0.0
    """Probability that the answers of a pair were exchanged."""

    def validate(self):
        self.require(self.beta > 0, "beta", "positive")
        self.require(0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and below 0.5")

    def per_pair(self, own, reference):
        reward = self.beta * margin(own, reference)
        sure, wrong = jax.nn.log_sigmoid(reward), jax.nn.log_sigmoid(-reward)
        return -(1 - self.label_smoothing) * sure - self.label_smoothing * wrong
