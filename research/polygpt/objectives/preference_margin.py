"""How well a model tells preferred from rejected answers: to watch in training, with weight 0."""

import dataclasses

import jax.numpy as jnp

from polygpt.objectives.preference import PreferenceObjective, margin


@dataclasses.dataclass(frozen=True)
class PreferenceMargin(PreferenceObjective):
    """Mean over pairs of log p(preferred) - log p(rejected), minus that of the reference, in nats. Higher is better."""

    def per_pair(self, own, reference):
        return margin(own, reference)


@dataclasses.dataclass(frozen=True)
class PreferenceAccuracy(PreferenceObjective):
    """Fraction of pairs whose margin is above 0. Has no gradient."""

    def per_pair(self, own, reference):
        return jnp.where(margin(own, reference) > 0, 1.0, 0.0)
