"""A sliding window, and the first positions beside it."""

import dataclasses

from polygpt.attention.masks import Sinks, Window
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class SinksAndWindow(MultiHead):
    """Attention to the first positions and to the nearest. Xiao et al., StreamingLLM (2309.17453), section 3.2.

    The first positions take the weight that a softmax must give to something: texts far longer than the window stay
    likely. Position ids are those of the text, where the paper counts within its cache; the cache is a ring of
    `sinks + window` positions.
    """

    paper = "2309.17453"

    sinks: int = 4
    """How many first positions every query sees."""
    window: int = 64
    """How many positions up to and with itself a query sees; in a tower as many to the other side too."""

    def validate(self):
        super().validate()
        self.require(self.sinks >= 1, "sinks", "at least 1")
        self.require(self.window >= 1, "window", "at least 1")

    def mask(self, mask):
        return mask & (Window(self.window) | Sinks(self.sinks))

    def cost(self):
        return "4 H d min(S, sinks + window)"
