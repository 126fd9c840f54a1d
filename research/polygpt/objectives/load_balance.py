"""Keeps experts equally busy."""

import dataclasses
from typing import ClassVar

from polygpt.objectives.routing import RoutingObjective


@dataclasses.dataclass(frozen=True)
class LoadBalance(RoutingObjective):
    """E sum_e f_e P_e of each routed layer, summed: Fedus et al., Switch (2101.03961), eq. 4; weighted by 1e-2 there.

    A layer whose experts are used alike gives 1, one that uses a single expert E / top_k at most.
    """

    loss: ClassVar[str] = "load_balance"
