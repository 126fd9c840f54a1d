"""Lowers the learning rate when the run's metric stops improving."""

import dataclasses

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Plateau(Spec):
    """Multiplies the learning rate by `factor` each time the run's metric has not improved for some evaluations.

    This scales what the schedule gives, for all groups. The state is in the checkpoints.
    """

    factor: float = 0.5
    """Factor on the learning rate."""
    patience: int = 3
    """Number of consecutive evaluations without improvement after which it is lowered, and lowered again."""
    lowest: float = 0.0
    """Smallest product of the factors."""

    def validate(self):
        self.require(0 < self.factor < 1, "factor", "above 0 and below 1")
        self.require(self.patience >= 1, "patience", "at least 1")
        self.require(0 <= self.lowest <= 1, "lowest", "in 0..1")

    def scale(self, reductions: int) -> float:
        """The scale of the learning rate after this many reductions."""
        return max(self.lowest, self.factor**reductions)
