"""Cross entropy of labels that do not exclude each other."""

import dataclasses

import jax
import numpy as np

from polygpt.objectives.labelled import LabelObjective, numbers


@dataclasses.dataclass(frozen=True)
class MultiLabel(LabelObjective):
    """Binary cross entropy in nats of each number of a label, which is the probability that something holds: 0 or 1.

    An example may have several of K kinds, and some may be unknown.
    """

    def small_label(self, number):
        return number[:, None] >> np.arange(3) & 1

    def mismatch(self, outputs, label):
        if label.classes != 2:
            return "declare it as 0 or 1, Label((K,), classes=2)"
        if outputs != numbers(label):
            return f"it has {numbers(label)} numbers and the head has {outputs} outputs; they must be equal"
        return None

    def per_number(self, scores_BTK: jax.Array, label_BTn: jax.Array) -> jax.Array:
        return jax.nn.softplus(scores_BTK) - label_BTn * scores_BTK
