"""Sliding window attention."""

import dataclasses

from polygpt.attention.masks import Window
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class SlidingWindow(MultiHead):
    """Attention to the nearest positions only. Beltagy et al., Longformer (2004.05150), section 3.1; in decoders Child
    et al. (1904.10509), section 4.3, and Jiang et al., Mistral (2310.06825), section 2.

    Through L layers, information travels up to L (window - 1) positions. The cache is a ring buffer of `window`
    positions.
    """

    paper = "2004.05150"

    window: int = 64
    """Number of positions that a query sees, up to and including itself; in a tower, as many after it."""

    def validate(self):
        super().validate()
        self.require(self.window >= 1, "window", "at least 1")

    def mask(self, mask):
        return mask & Window(self.window)

    def cost(self):
        return "4 H d min(S, window)"
