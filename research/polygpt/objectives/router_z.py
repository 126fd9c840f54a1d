"""Regularisation of router logits."""

import dataclasses
from typing import ClassVar

from polygpt.objectives.routing import RoutingObjective


@dataclasses.dataclass(frozen=True)
class RouterZLoss(RoutingObjective):
    """log² Z of the router softmax, summed over routed layers: Zoph et al., ST-MoE (2202.08906), eq. 5, weight 1e-3."""

    loss: ClassVar[str] = "router_z"
