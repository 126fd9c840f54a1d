"""Block-sparse attention: neighbouring blocks, plus global first blocks."""

import dataclasses

from polygpt.attention.masks import Blockwise, Global
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class BlockSparse(MultiHead):
    """Attention within a block, to the blocks around it and to the first blocks, which in a tower also see everything.
    Zaheer et al., BigBird (2007.14062), section 2 and appendix D, without its random blocks; without neighbouring and
    global blocks, the identity permutation of Qiu et al. (1911.02972), section 3.1.

    Blocks are counted from the start of each packed example. The cache is a ring buffer.
    """

    paper = "2007.14062"

    block: int = 32
    """Positions per block."""
    around: int = 1
    """Number of blocks before its own that a query sees; in a tower, as many after it."""
    shared: int = 1
    """Number of first blocks that all queries see."""

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
