"""Shows how much a mixture of experts with a capacity leaves out."""

import dataclasses
from typing import ClassVar

from polygpt.objectives.routing import RoutingObjective


@dataclasses.dataclass(frozen=True)
class Dropped(RoutingObjective):
    """The share of choices for which an expert had no place, of each routed layer, summed. It has no gradient.

    It is there to be looked at: give it the weight 0.
    """

    loss: ClassVar[str] = "dropped"
