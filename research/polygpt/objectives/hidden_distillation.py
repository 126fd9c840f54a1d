"""Distillation of hidden vectors."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective, require_blind
from polygpt.objectives.forward import OWN
from polygpt.objectives.needs import Needs
from polygpt.sequence import Batch
from polygpt.spec import nearest


@dataclasses.dataclass(frozen=True)
class HiddenDistillation(Objective):
    """Distance between hidden vectors of the model and of a teacher, at positions with a loss weight: of the last ones,
    or the mean over pairs of inner layers (TinyBERT: Jiao et al., 1909.10351, equation 8)."""

    teacher: str = "teacher"
    """Its name in `references`; "average" for the moving average of the model's own parameters."""
    distance: Literal["cosine", "square"] = "cosine"
    """cosine: 1 - cosine (Sanh et al., DistilBERT, 1910.01108, section 3). square: the mean of the squared differences
    (Romero et al., FitNets, 1412.6550, equation 3)."""
    head: str | None = None
    """A head in `model.heads` that maps the hidden vectors to the teacher's width, such as a `LinearHead`, the same for
    all layers; null to compare them as they are."""
    layers: tuple[tuple[int, int], ...] = ()
    """Pairs of a block of the model and one of the teacher, numbered from 0, or from -1 backwards. Empty: the vectors
    after the last block and the final norm."""
    site: Literal["residual", "attention", "mlp"] = "residual"
    """What is compared of each pair: the residual stream after the blocks, or the output of one of their branches."""

    @classmethod
    def small(cls) -> "HiddenDistillation":
        return cls(head="wider", layers=((0, 1), (-1, -1)))

    @property
    def needs(self) -> Needs:
        if self.head is None:
            return Needs()
        head = {"class": "polygpt.heads.linear:LinearHead", "outputs": 16, "pool": "last"}
        return Needs("a head of the teacher's width", {"heads": json.dumps({self.head: head})})

    def check_with(self, model, layout) -> None:
        if self.head is not None and self.head not in model.heads:
            there = nearest(self.head, model.heads) if model.heads else "there are none"
            raise SpecError(f"reads the head {self.head!r}, which is not in model.heads: {there}")
        for own, _ in self.layers:
            _require_block(own, model.decoder.depth, "the model")

    def check_other(self, other, model) -> None:
        if model.decoder.mask != "bidirectional":  # an encoder may learn from an encoder
            require_blind(other, "its student predicts")
        for _, theirs in self.layers:
            _require_block(theirs, other.decoder.depth, repr(self.teacher))
        ours = model.decoder.width if self.head is None else model.heads[self.head].outputs
        self._require_width(ours, other.decoder.width)

    def _require_width(self, ours: int, theirs: int) -> None:
        if ours != theirs:
            raise SpecError(
                f"HiddenDistillation: the model's vectors have {ours} numbers and those of {self.teacher!r} {theirs}: "
                f"set head to a head of the model with {theirs} outputs"
            )

    @property
    def others(self) -> tuple[str, ...]:
        return (self.teacher,)

    @property
    def captures(self) -> Mapping[str, Sequence[str]]:
        return {OWN: (self.site,), self.teacher: (self.site,)} if self.layers else {}

    def total(self, outputs, batch: Batch) -> jax.Array:
        teacher = outputs.other(self.teacher)
        if not self.layers:
            return self._total(outputs, outputs.hidden_BTD, teacher.hidden_BTD, batch)
        ours_LBTD, theirs_LBTD = outputs.captured(self.site), teacher.captured(self.site)
        for pair in self.layers:
            _require_block(pair[0], len(ours_LBTD), "the model")
            _require_block(pair[1], len(theirs_LBTD), repr(self.teacher))
        totals = (self._total(outputs, ours_LBTD[own], theirs_LBTD[other], batch) for own, other in self.layers)
        return sum(totals) / len(self.layers)

    def _total(self, outputs, ours_BTD: jax.Array, theirs_BTD: jax.Array, batch: Batch) -> jax.Array:
        if self.head is not None:
            ours_BTD = outputs.head(self.head, ours_BTD)
        self._require_width(ours_BTD.shape[-1], theirs_BTD.shape[-1])
        used_BT1 = (batch.weight_BT != 0)[..., None]
        ours_BTD, theirs_BTD = (jnp.where(used_BT1, x.astype(jnp.float32), 1) for x in (ours_BTD, theirs_BTD))
        if self.distance == "square":
            found_BT = jnp.mean(jnp.square(ours_BTD - theirs_BTD), axis=-1)
        else:
            product_BT = jnp.sum(ours_BTD * theirs_BTD, axis=-1)
            squares_BT = jnp.sum(jnp.square(ours_BTD), axis=-1) * jnp.sum(jnp.square(theirs_BTD), axis=-1)
            found_BT = 1 - product_BT * jax.lax.rsqrt(squares_BT + 1e-12)
        return jnp.sum(batch.weight_BT * found_BT)


def _require_block(number: int, depth: int, whose: str) -> None:
    if not -depth <= number < depth:
        raise SpecError(f"HiddenDistillation.layers: {whose} has no block {number}: it has {depth}, numbered from 0")
