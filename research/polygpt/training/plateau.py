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
    min_scale: float = 0.0
    """Smallest product of the factors, as in optax.contrib.reduce_on_plateau."""

    def validate(self):
        self.require(0 < self.factor < 1, "factor", "above 0 and below 1")
        self.require(self.patience >= 1, "patience", "at least 1")
        self.require(0 <= self.min_scale <= 1, "min_scale", "in 0..1")

    def scale(self, reductions: int) -> float:
        """The scale of the learning rate after this many reductions."""
        return max(self.min_scale, self.factor**reductions)
