"""Variants that are wrong on several devices alone."""

import dataclasses

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
