"""Penalties on parameters: their distance from zero, or from those of another model."""

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp

from polygpt.errors import SpecError
from polygpt.objectives.base import Objective
from polygpt.parameters import paths
from polygpt.sequence import Batch
from polygpt.spec import check_pattern


@dataclasses.dataclass(frozen=True)
class ParameterPenalty(Objective):
    """A norm of the trained parameters that a pattern matches. Unlike weight decay, it is part of the gradient that the
    optimizer sees. With `toward` the run's initial parameters (`Reference()`), l2 is L2-SP: Li et al. (1802.01483),
    equation 2."""

    pattern: str
    """Regular expression, searched in the parameter's name, such as `^decoder/.*kernel`."""
    norm: Literal["l1", "l2"] = "l2"
    """l1: the sum of absolute values. l2: half the sum of squares."""
    toward: str | None = None
    """Name in `references` of the model, of the same parameters, from which the distance counts; null for zero."""

    def validate(self):
        check_pattern(self, "pattern")

    @classmethod
    def small(cls) -> "ParameterPenalty":
        return cls("^decoder/.*kernel", toward="origin")

    @property
    def others(self) -> tuple[str, ...]:
        return () if self.toward is None else (self.toward,)

    def total(self, outputs, batch: Batch) -> jax.Array:
        chosen = {name: x for name, x in outputs.trained.items() if re.search(self.pattern, name)}
        if not chosen:
            raise SpecError(
                f"ParameterPenalty: {self.pattern!r} matches no trained parameter; see `polygpt model show`"
            )
        if self.toward is not None:
            origin = paths(outputs.other(self.toward).params)
            for name, x in chosen.items():
                if name not in origin or origin[name].shape != x.shape:
                    raise SpecError(f"ParameterPenalty: the model {self.toward!r} lacks {name} of shape {x.shape}")
                chosen[name] = x - origin[name]
        if self.norm == "l1":
            found = sum(jnp.sum(jnp.abs(x)) for x in chosen.values())
        else:
            found = sum(jnp.sum(jnp.square(x)) for x in chosen.values()) / 2
        return batch.shape[0] * found

    def weight(self, batch: Batch) -> jax.Array:
        """The number of rows: the mean over microbatches and devices is then the penalty itself."""
        return jnp.float32(batch.shape[0])
