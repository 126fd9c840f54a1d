"""Simple preference optimization."""

import dataclasses

import jax

from polygpt.objectives.preference import PreferenceObjective


@dataclasses.dataclass(frozen=True)
class SimPO(PreferenceObjective):
    """Preference optimization by the mean log-probability per token, without a reference: Meng et al., SimPO
    (2405.14734), equation 6."""

    reference: str | None = None
    """Null: it reads no reference."""
    beta: float = 2.0
    """Scale of the mean log-probabilities."""
    gamma: float = 1.0
    """The margin by which the preferred answer should win, on the scale of beta. TRL takes gamma / beta."""

    def validate(self):
        self.require(self.reference is None, "reference", "null")
        self.require(self.scores is None, "scores", "null: it reads no reference")
        self.require(self.beta > 0, "beta", "positive")
        self.require(self.gamma >= 0, "gamma", "0 or above")

    def per_pair(self, own, reference):
        return -jax.nn.log_sigmoid(self.beta * (own.mean_chosen - own.mean_rejected) - self.gamma)
