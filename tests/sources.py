"""Batches whose examples have sources, and small encoder-decoders that read them."""

import numpy as np

from batches import ADAPTERS, VOCABULARY, build, lively
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.cross import CrossSequential
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.functional import bind
from polygpt.sequence import PROMPT


def build_sources(rows, length: int, *, adapters=ADAPTERS, bidirectional: bool = False):
    """As `batches.build`, of pairs (example, number of positions of its source); what is in a source is not scored."""
    batch = build([[one for one, _ in row] for row in rows], length, adapters=adapters, bidirectional=bidirectional)
    span_BT, weight_BT = batch.span_BT + PROMPT * (batch.span_BT > 0), batch.weight_BT.copy()
    for b, row in enumerate(rows):
        for segment, (_, read) in enumerate(row, start=1):
            source = np.flatnonzero(batch.segment_BT[b] == segment)[:read]
            span_BT[b, source] = PROMPT
            weight_BT[b, source[:-1]] = 0
    return batch.replace(span_BT=span_BT, weight_BT=weight_BT)


def small(adapters=None, dtype="float32", encoder=None, block=None, **decoder) -> EncoderDecoder:
    """An encoder-decoder of two blocks each and sixteen channels; keywords are fields of its decoder."""
    fields = {"width": 16, "depth": 2, "attention": MultiHead(4, 2), "block": block or CrossSequential()} | decoder
    return EncoderDecoder(DecoderSpec(**fields), adapters or {}, dtype, encoder=encoder)


def small_model(seed: int = 0, scale: float = 0.3, **options):
    """`small(**options)` bound, and lively parameters for it."""
    model = bind(small(**options), VOCABULARY)
    return model, lively(model, seed, scale)
