"""Measures how many choices a mixture of experts with a capacity drops."""

import dataclasses
from typing import ClassVar

from polygpt.objectives.needs import Needs
from polygpt.objectives.routing import RoutingObjective


@dataclasses.dataclass(frozen=True)
class Dropped(RoutingObjective):
    """The fraction of choices dropped for lack of a free slot, summed over routed layers. It has no gradient.

    For monitoring only: give it weight 0.
    """

    loss: ClassVar[str] = "dropped"

    @property
    def needs(self) -> Needs:
        routed = super().needs
        return Needs("a routed layer with a capacity", {**routed.model, "decoder.mlp.capacity": "1"}, whole_rows=True)
