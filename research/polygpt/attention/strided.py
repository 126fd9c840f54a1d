"""Local plus strided attention."""

import dataclasses

from polygpt.attention.masks import Strided, Window
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class LocalAndStrided(MultiHead):
    """Attention to the nearest positions and, beyond those, at multiples of the stride. Child et al., sparse
    transformers (1904.10509), section 4.3, with both patterns in each head (section 5.2).

    Two layers connect any position to any later one, at a cost of about T sqrt(T) if the stride is near sqrt(T).
    Strided keys occur in all blocks, so kernels that skip empty blocks skip none of them.
    """

    paper = "1904.10509"

    stride: int = 16
    """Distance between successive strided keys."""
    window: int | None = None
    """Number of positions that a query sees without gaps, up to and including itself; null for the stride."""

    def validate(self):
        super().validate()
        self.require(self.stride >= 1, "stride", "at least 1")
        self.require(self.window is None or self.window >= 1, "window", "at least 1")

    def mask(self, mask):
        return mask & (Window(self.window or self.stride) | Strided(self.stride))

    def score_flops(self, width, keys):
        return super().score_flops(width, min(keys, (self.window or self.stride) + keys / self.stride))

    def cost(self):
        return "4 H d min(S, window + S / stride)"
