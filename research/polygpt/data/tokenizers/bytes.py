"""The tokenizer that needs no file: one token per byte."""

import dataclasses

import numpy as np

from polygpt.data.tokenizers.base import Tokenizer, TokenizerSpec


@dataclasses.dataclass(frozen=True)
class Bytes(TokenizerSpec):
    """UTF-8 bytes as ids 0 to 255; 256 is `bos`, 257 is `eos`."""

    def build(self) -> Tokenizer:
        return ByteTokenizer().padded(self.multiple)


class ByteTokenizer(Tokenizer):
    """See `Bytes`."""

    def __init__(self):
        super().__init__([bytes([value]) for value in range(256)])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)
