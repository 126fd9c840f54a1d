"""Load balancing of experts."""

import dataclasses
from typing import ClassVar

from polygpt.objectives.needs import Needs
from polygpt.objectives.routing import RoutingObjective


@dataclasses.dataclass(frozen=True)
class LoadBalance(RoutingObjective):
    """E sum_e f_e P_e, summed over routed layers: Fedus et al., Switch (2101.03961), eq. 4; they use weight 1e-2.

    A layer that uses all experts equally contributes 1, a collapsed layer at most E / top_k.
    """

    loss: ClassVar[str] = "load_balance"

    @property
    def needs(self) -> Needs:
        return dataclasses.replace(super().needs, whole_rows=True)
