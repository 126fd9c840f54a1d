"""Attention sinks plus a sliding window."""

import dataclasses

from polygpt.attention.masks import Sinks, Window
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class SinksAndWindow(MultiHead):
    """Attention to the first positions and to the nearest. Xiao et al., StreamingLLM (2309.17453), section 3.2.

    The first positions absorb the weight that softmax must assign somewhere, which keeps texts far longer than the
    window likely. Position ids are those of the text, whereas the paper counts positions within its cache. The cache is
    a ring buffer of `sinks + window` positions.
    """

    paper = "2309.17453"

    sinks: int = 4
    """Number of first positions that every query sees."""
    window: int = 64
    """Number of positions that a query sees, up to and including itself; in a tower, as many after it."""

    def validate(self):
        super().validate()
        self.require(self.sinks >= 1, "sinks", "at least 1")
        self.require(self.window >= 1, "window", "at least 1")

    def mask(self, mask):
        return mask & (Window(self.window) | Sinks(self.sinks))

    def cost(self):
        return "4 H d min(S, sinks + window)"
