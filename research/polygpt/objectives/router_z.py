"""Keeps the logits of routers small."""

import dataclasses
from typing import ClassVar

from polygpt.objectives.routing import RoutingObjective


@dataclasses.dataclass(frozen=True)
class RouterZLoss(RoutingObjective):
    """log² Z of each routed layer, summed: Zoph et al., ST-MoE (2202.08906), eq. 5; weighted by 1e-3 there."""

    loss: ClassVar[str] = "router_z"
