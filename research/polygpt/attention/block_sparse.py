"""Blocks of positions that see their neighbours, and first blocks that all see."""

import dataclasses

from polygpt.attention.masks import Blockwise, Global
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class BlockSparse(MultiHead):
    """Attention within a block, to the blocks around it and to the first blocks, which in a tower see everything too.
    Zaheer et al., BigBird (2007.14062), section 2 and appendix D, without its random blocks; with no blocks around and
    none for all, the identity permutation of Qiu et al. (1911.02972), section 3.1.

    Blocks are counted from the beginning of each packed example. The cache is a ring.
    """

    paper = "2007.14062"

    block: int = 32
    """Positions of a block."""
    around: int = 1
    """How many blocks a query sees before its own; in a tower as many after it too."""
    shared: int = 1
    """How many first blocks all queries see."""

    def validate(self):
        super().validate()
        self.require(self.block >= 1, "block", "at least 1")
        self.require(self.around >= 0, "around", "at least 0")
        self.require(self.shared >= 0, "shared", "at least 0")

    def mask(self, mask):
        seen = Blockwise(self.block, self.around)
        return mask & (seen | Global(self.block * self.shared) if self.shared else seen)

    def score_flops(self, width, keys):
        return super().score_flops(width, min(keys, self.block * (self.around + 1 + self.shared)))

    def cost(self):
        return "4 H d min(S, block (around + 1 + shared))"
