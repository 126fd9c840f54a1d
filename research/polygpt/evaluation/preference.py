"""How well a model tells the preferred from the rejected answers of pairs, without a reference."""

import numpy as np

from polygpt.evaluation.likelihood import Likelihoods
from polygpt.evaluation.metric import Measure

PREFERENCE = (
    Measure("preference_margin", "higher", unit="nats", needs="likelihood"),
    Measure("preference_accuracy", "higher", share=True, needs="likelihood"),
)
"""Measures of tasks whose examples have rejected answers."""


def preference(chosen: Likelihoods, rejected: Likelihoods) -> dict[str, float]:
    """The values of PREFERENCE: the mean of log p(preferred) - log p(rejected), and how often it is above 0."""
    margin = rejected.loss - chosen.loss
    return {"preference_margin": float(np.mean(margin)), "preference_accuracy": float(np.mean(margin > 0))}
