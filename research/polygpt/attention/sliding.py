"""A window that slides along with the query."""

import dataclasses

from polygpt.attention.masks import Window
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class SlidingWindow(MultiHead):
    """Attention to the nearest positions alone. Beltagy et al., Longformer (2004.05150), section 3.1; in decoders Child
    et al. (1904.10509), section 4.3, and Jiang et al., Mistral (2310.06825), section 2.

    Through L layers a position hears of what is up to L (window - 1) positions away. The cache is a ring of `window`.
    """

    paper = "2004.05150"

    window: int = 64
    """How many positions up to and with itself a query sees; in a tower as many to the other side too."""

    def validate(self):
        super().validate()
        self.require(self.window >= 1, "window", "at least 1")

    def mask(self, mask):
        return mask & Window(self.window)

    def cost(self):
        return "4 H d min(S, window)"
