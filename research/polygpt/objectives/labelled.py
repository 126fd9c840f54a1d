"""Base of the objectives that compare a head of the model with a label."""

import dataclasses
import json
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.objectives.needs import Needs
from polygpt.sequence import Batch
from polygpt.spec import nearest


@dataclasses.dataclass(frozen=True)
class LabelObjective(Objective):
    """The mean loss over all numbers of a label that are known, at whichever positions.

    A label may be of whole examples or of tokens; the loss is the same. Its weight is the count of known numbers: for a
    single number the labelled positions. Loss weights of tokens do not matter.
    """

    small_outputs: ClassVar[int] = 3
    """Outputs of the head in `needs`."""

    head: str
    """Name of the head in `model.heads`."""
    label: str | None = None
    """Name of the label in `data.layout.labels`; null for that of the head."""

    @property
    def named(self) -> str:
        """The name of the label."""
        return self.head if self.label is None else self.label

    @classmethod
    def small(cls) -> "LabelObjective":
        return cls("label")

    @property
    def needs(self) -> Needs:
        head = {"class": "polygpt.heads.linear:LinearHead", "outputs": self.small_outputs, "pool": "last"}
        return Needs("a head and a label", {"heads": json.dumps({self.head: head})}, self._with_labels)

    def small_label(self, number: np.ndarray) -> np.ndarray:
        """Labels [n, ...] of examples with these numbers, int [n]; in `needs`."""
        return number % 3

    def _with_labels(self, batch: Batch, number_BT: np.ndarray) -> Batch:
        """The batch with a label at the last position of every example but each fifth."""
        last_BT = number_BT != np.pad(number_BT[:, 1:], ((0, 0), (0, 1)))
        labelled = np.nonzero(last_BT & (number_BT > 0) & (number_BT % 5 != 0))
        found = self.small_label(number_BT[labelled])
        label = np.full((*number_BT.shape, *found.shape[1:]), np.nan, np.float32)
        label[labelled] = found
        return batch.replace(extra={**batch.extra, self.named: label})

    def check_with(self, model, layout) -> None:
        require_label(self.head, self.named, model, layout)
        if must := self.mismatch(model.heads[self.head].outputs, layout.labels[self.named]):
            raise SpecError(f"{self.named!r} and its head {self.head!r} do not fit: {must}")

    def mismatch(self, outputs: int, label) -> str | None:
        """What must change for a head with `outputs` to predict a label (`data.labels.Label`); None if it can."""
        raise NotImplementedError(f"{type(self).__name__} defines no mismatch")

    def per_number(self, scores_BTK: jax.Array, label_BTn: jax.Array) -> jax.Array:
        """The loss of each number, [B, T, n]. At numbers that are not known, labels are 0 and the loss is not used."""
        raise NotImplementedError(f"{type(self).__name__} defines no per_number")

    def total(self, outputs, batch: Batch) -> jax.Array:
        label_BTn, known_BTn = self._label(batch)
        # Outputs at positions without a label reach neither sum nor gradient.
        scores_BTK = jnp.where(known_BTn.any(axis=-1, keepdims=True), outputs.head(self.head), 0.0)
        loss_BTn = self.per_number(scores_BTK, jnp.where(known_BTn, label_BTn, 0.0))
        return jnp.sum(jnp.where(known_BTn, loss_BTn, 0.0))

    def weight(self, batch: Batch) -> jax.Array:
        return jnp.sum(self._label(batch)[1], dtype=jnp.float32)

    def _label(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The numbers of the label and whether they are known, [B, T, n]."""
        label = jnp.asarray(batch.extra[self.named])
        label_BTn = label.reshape(*label.shape[:2], -1)
        return label_BTn, ~jnp.isnan(label_BTn)


def require_label(head: str, label: str, model, layout) -> None:
    """Raises SpecError if the model (`ModelSpec`) lacks the head, or the layout (`LayoutSpec`) the label."""
    for kind, name, there, field in (
        ("head", head, model.heads, "model.heads"),
        ("label", label, layout.labels, "data.layout.labels"),
    ):
        if name not in there:
            known = nearest(name, there) if there else "there are none"
            raise SpecError(f"reads the {kind} {name!r}, which is not in {field}: {known}")


def numbers(label) -> int:
    """n, how many numbers a label is."""
    return math.prod(label.shape)
