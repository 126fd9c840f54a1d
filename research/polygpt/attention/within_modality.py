"""Attention that keeps modalities apart."""

import dataclasses

from polygpt.attention.masks import SameModality
from polygpt.attention.multi_head import MultiHead


@dataclasses.dataclass(frozen=True)
class WithinModality(MultiHead):
    """Attention among the positions of one modality: text sees no media, and media see no text. The unimodal layers of
    CoCa, Yu et al. (2205.01917), section 3.2, which "omit cross-attention"; in a pattern before `GatedCross` layers.
    """

    paper = "2205.01917"

    def mask(self, mask):
        return super().mask(mask) & SameModality()
