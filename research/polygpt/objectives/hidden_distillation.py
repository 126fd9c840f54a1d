"""Distillation of hidden vectors."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class HiddenDistillation(Objective):
    """Distance between the last hidden vectors of the model and of a teacher of the same width, at positions with a
    loss weight."""

    teacher: str = "teacher"
    """Its name in `references`; "average" for the moving average of the model's own parameters."""
    distance: Literal["cosine", "square"] = "cosine"
    """cosine: 1 - cosine (Sanh et al., DistilBERT, 1910.01108, section 3). square: the mean of the squared differences
    (Romero et al., FitNets, 1412.6550, equation 3)."""

    @property
    def others(self) -> tuple[str, ...]:
        return (self.teacher,)

    def total(self, outputs, batch: Batch) -> jax.Array:
        ours_BTD, theirs_BTD = outputs.hidden_BTD, outputs.other(self.teacher).hidden_BTD
        if ours_BTD.shape != theirs_BTD.shape:
            widths = ours_BTD.shape[-1], theirs_BTD.shape[-1]
            raise SpecError(
                f"HiddenDistillation: the model's width is {widths[0]} and that of {self.teacher!r} {widths[1]}: use a "
                "teacher of the same width, or polygpt.objectives.distillation:Distillation, which needs none"
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
