"""The nearest positions, and every n-th of all others."""

import dataclasses

from polygpt.attention.masks import Strided, Window
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class LocalAndStrided(MultiHead):
    """Attention to the nearest positions and, beyond, to those at a multiple of the stride. Child et al., sparse
    transformers (1904.10509), section 4.3, with both patterns in each head (section 5.2).

    Any position is heard of by any later one after two layers, at a cost of about T sqrt(T) where the stride is near
    sqrt(T). The positions at a stride lie in all blocks: kernels that skip empty blocks skip none of them.
    """

    paper = "1904.10509"

    stride: int = 16
    """Positions from one distant key to the next."""
    window: int | None = None
    """How many positions up to and with itself a query sees without gaps; null means as many as the stride."""

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
