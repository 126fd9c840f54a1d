"""Cross entropy of a class, of whole examples or of tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.objectives.labelled import LabelObjective


@dataclasses.dataclass(frozen=True)
class LabelClassification(LabelObjective):
    """Cross entropy in nats of one class of several. With labels of texts it classifies tokens."""

    label_smoothing: float = 0.0
    """Fraction of the probability spread evenly over the classes (Szegedy et al. 2016, section 7)."""

    def validate(self):
        self.require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")

    def mismatch(self, outputs, label):
        if label.shape or label.classes is None:
            return "declare it as one of several classes, Label(classes=...)"
        if outputs != label.classes:
            return f"it has {label.classes} classes and the head has {outputs} outputs; they must be equal"
        return None

    def per_number(self, scores_BTK: jax.Array, label_BTn: jax.Array) -> jax.Array:
        classes = scores_BTK.shape[-1]
        target_BTK = jax.nn.one_hot(label_BTn[..., 0].astype(jnp.int32), classes)
        target_BTK = (1 - self.label_smoothing) * target_BTK + self.label_smoothing / classes
        return -jnp.sum(target_BTK * jax.nn.log_softmax(scores_BTK), axis=-1, keepdims=True)
