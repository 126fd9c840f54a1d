"""The contract of a tokenizer: text to ids and back, two special ids that no text can produce."""

import dataclasses

import numpy as np

from polygpt.spec import Spec


class Tokenizer:
    """Byte-level tokens numbered from 0, then the two special ids: beginning and end of an example.

    A subclass gives `encode`; whatever the text, the ids lie below `bos`.

    Attributes:
        vocabulary: the number of ids, specials and those that never occur included.
        used: the number of ids that occur; those from here on do not.
        bos: the id that begins every example.
        eos: the id that ends every example.
        token_bytes: int32 [vocabulary], UTF-8 bytes that each token stands for; 0 for specials and unused ids.
    """

    def __init__(self, pieces: list[bytes]):
        """Args: pieces: the bytes of each token."""
        self._pieces = [*pieces, b"", b""]
        self.bos, self.eos = len(pieces), len(pieces) + 1
        self.used = self.vocabulary = len(pieces) + 2
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)

    def padded(self, multiple: int) -> "Tokenizer":
        """This tokenizer, its vocabulary rounded up to a multiple by ids that never occur and stand for nothing."""
        more = -self.vocabulary % multiple
        self._pieces += [b""] * more
        self.vocabulary += more
        self.token_bytes = np.pad(self.token_bytes, (0, more))
        return self

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32. Lone surrogates, which no UTF-8 text holds, become question marks."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of some ids. Specials are skipped; bytes that are no UTF-8 become the replacement character."""
        return b"".join([self._pieces[i] for i in ids]).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class TokenizerSpec(Spec):
    """Which tokenizer. Subclasses live one a file."""

    multiple: int = dataclasses.field(default=1, kw_only=True)
    """The vocabulary is rounded up to a multiple of this, so that its tables divide over devices and fill whole tiles;
    the ids in between never occur."""

    def validate(self):
        self.require(self.multiple >= 1, "multiple", "at least 1")

    def build(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: if a file that it needs is missing or not what it should be.
        """
        raise NotImplementedError
