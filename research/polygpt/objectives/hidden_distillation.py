"""Distillation of hidden vectors."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.sequence import Batch
from polygpt.spec import nearest


@dataclasses.dataclass(frozen=True)
class HiddenDistillation(Objective):
    """Distance between the last hidden vectors of the model and of a teacher, at positions with a loss weight."""

    teacher: str = "teacher"
    """Its name in `references`; "average" for the moving average of the model's own parameters."""
    distance: Literal["cosine", "square"] = "cosine"
    """cosine: 1 - cosine (Sanh et al., DistilBERT, 1910.01108, section 3). square: the mean of the squared differences
    (Romero et al., FitNets, 1412.6550, equation 3)."""
    head: str | None = None
    """A head in `model.heads` that maps the hidden vectors to the teacher's width, such as a `LinearHead`; null to
    compare them as they are."""

    def check_with(self, model, layout) -> None:
        if self.head is not None and self.head not in model.heads:
            there = nearest(self.head, model.heads) if model.heads else "there are none"
            raise SpecError(f"reads the head {self.head!r}, which is not in model.heads: {there}")

    @property
    def others(self) -> tuple[str, ...]:
        return (self.teacher,)

    def total(self, outputs, batch: Batch) -> jax.Array:
        ours_BTD = outputs.hidden_BTD if self.head is None else outputs.head(self.head)
        theirs_BTD = outputs.other(self.teacher).hidden_BTD
        if ours_BTD.shape != theirs_BTD.shape:
            widths = ours_BTD.shape[-1], theirs_BTD.shape[-1]
            raise SpecError(
                f"HiddenDistillation: the model's vectors have {widths[0]} numbers and those of {self.teacher!r} "
                f"{widths[1]}: set head to a head of the model with {widths[1]} outputs"
            )
        used_BT1 = (batch.weight_BT != 0)[..., None]
        ours_BTD, theirs_BTD = (jnp.where(used_BT1, x.astype(jnp.float32), 1) for x in (ours_BTD, theirs_BTD))
        if self.distance == "square":
            found_BT = jnp.mean(jnp.square(ours_BTD - theirs_BTD), axis=-1)
        else:
            product_BT = jnp.sum(ours_BTD * theirs_BTD, axis=-1)
            squares_BT = jnp.sum(jnp.square(ours_BTD), axis=-1) * jnp.sum(jnp.square(theirs_BTD), axis=-1)
            found_BT = 1 - product_BT * jax.lax.rsqrt(squares_BT + 1e-12)
        return jnp.sum(batch.weight_BT * found_BT)
