"""Losses of numbers: squared and absolute errors, and likelihoods of counts and of measurements with their noise."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.objectives.labelled import LabelObjective, numbers


@dataclasses.dataclass(frozen=True)
class Regression(LabelObjective):
    """The error y - x of each number y of a label, given the output x of a head.

    | loss | definition | source |
    |---|---|---|
    | mse | (y - x)^2 | |
    | huber | (y - x)^2 / 2 up to `delta`, beyond it delta (abs(y - x) - delta / 2) | Huber 1964 |
    | poisson | exp(x) - y x: negative log-likelihood of a count y, without log(y!); x is the logarithm of its mean | |
    | gaussian | (s + (y - x)^2 / exp(s)) / 2: negative log-likelihood, without log(2 pi) / 2 | Nix and Weigend 1994 |

    For gaussian the head has twice as many outputs as the label has numbers: all x, then all s, the logarithms of the
    variances.
    """

    loss: Literal["mse", "huber", "poisson", "gaussian"] = "mse"
    """The loss of each number."""
    delta: float = 1.0
    """Error from which the Huber loss is linear."""

    def validate(self):
        self.require(self.delta > 0, "delta", "above 0")

    @property
    def small_outputs(self) -> int:
        return 2 if self.loss == "gaussian" else 1

    def mismatch(self, outputs, label):
        needed = numbers(label) * (2 if self.loss == "gaussian" else 1)
        if outputs != needed:
            return f"it has {numbers(label)} numbers, for which the head must have {needed} outputs, not {outputs}"
        if self.loss == "poisson" and label.classes is None and (label.minimum is None or label.minimum < 0):
            return "counts are at least 0: declare it as Label(minimum=0), so that other records are refused"
        return None

    def per_number(self, scores_BTK: jax.Array, label_BTn: jax.Array) -> jax.Array:
        if self.loss == "poisson":
            return jnp.exp(scores_BTK) - label_BTn * scores_BTK
        if self.loss == "gaussian":
            mean_BTn, log_variance_BTn = jnp.split(scores_BTK, 2, axis=-1)
            return 0.5 * (log_variance_BTn + (label_BTn - mean_BTn) ** 2 * jnp.exp(-log_variance_BTn))
        error_BTn = label_BTn - scores_BTK
        if self.loss == "mse":
            return error_BTn**2
        size_BTn = jnp.abs(error_BTn)
        return jnp.where(size_BTn <= self.delta, 0.5 * error_BTn**2, self.delta * (size_BTn - 0.5 * self.delta))
