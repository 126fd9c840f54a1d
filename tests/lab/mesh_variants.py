"""Variants that are wrong on several devices alone."""

import dataclasses

import jax.numpy as jnp

from polygpt import sharding
from polygpt.api import MultiHead
from polygpt.attention.multi_head import MultiHeadModule


@dataclasses.dataclass(frozen=True)
class HalvesWhereSplit(MultiHead):
    """Results are off where one axis, given by name, is split."""

    axis: str = "positions"
    """The axis of arrays."""
    by: float = 1e-3
    """How much."""

    def build(self, dims, rngs):
        return HalvesWhereSplitModule(self, dims, rngs)


class HalvesWhereSplitModule(MultiHeadModule):
    def mixed(self, y_BHTe, lse_BHT, x_BTD, context):
        factor = 1 + self.spec.by if sharding.is_split(self.spec.axis) else 1.0
        return super().mixed(y_BHTe * factor, lse_BHT, x_BTD, context)


@dataclasses.dataclass(frozen=True)
class ShiftedValues(MultiHead):
    """The value of a position is that of its neighbour in the array, though it says that it needs no order."""

    in_order = False

    def build(self, dims, rngs):
        return ShiftedValuesModule(self, dims, rngs)


class ShiftedValuesModule(MultiHeadModule):
    def values(self, x_BTD, context):
        return super().values(jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1], context)
