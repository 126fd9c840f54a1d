"""The tokenizer contract: text to ids and back, plus special ids that never result from text."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable

import numpy as np

from polygpt.errors import UserError
from polygpt.spec import Spec, nearest


class Tokenizer:
    """Byte-level tokens numbered from 0, followed by two special ids for the beginning and the end of an example.

    A subclass implements `encode`, whose ids are below `bos` for any text.

    Attributes:
        vocabulary: number of ids, including the special ids and unused ids.
        used: number of ids that can occur; the ids from `used` on are unused.
        bos: the id that begins every example.
        eos: the id that ends every example.
        special: ids of further special tokens, by name; see `SpecialTokens`.
        token_bytes: int32 [vocabulary], number of UTF-8 bytes of each token; 0 for special and unused ids.
    """

    def __init__(self, pieces: list[bytes]):
        """Args: pieces: the bytes of each token."""
        self._pieces = [*pieces, b"", b""]
        self.bos, self.eos = len(pieces), len(pieces) + 1
        self.used = self.vocabulary = len(pieces) + 2
        self.special: dict[str, int] = {}
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)

    def padded(self, multiple: int) -> "Tokenizer":
        """Rounds the vocabulary up to a multiple by adding unused ids. Returns this tokenizer."""
        more = -self.vocabulary % multiple
        self._pieces += [b""] * more
        self.vocabulary += more
        self.token_bytes = np.pad(self.token_bytes, (0, more))
        return self

    def with_special(self, names: Iterable[str]) -> "Tokenizer":
        """Adds special tokens after the ids in use; unused ids come first. Returns this tokenizer."""
        for name in names:
            if self.used == self.vocabulary:
                self.padded(self.vocabulary + 1)
            self.special[name] = self.used
            self.used += 1
        return self

    @property
    def fingerprint(self) -> str:
        """A digest of the bytes of all ids and of the special tokens: equal only if all texts have equal ids."""
        found = hashlib.blake2b(digest_size=16)
        for piece in self._pieces:
            found.update(len(piece).to_bytes(4, "little") + piece)
        found.update(json.dumps([self.bos, self.eos, self.vocabulary, self.special]).encode())
        return found.hexdigest()

    def special_id(self, name: str) -> int:
        """The id of a special token. Raises UserError if there is none of this name."""
        if name not in self.special:
            there = f": {nearest(name, self.special)}" if self.special else ""
            raise UserError(f"the tokenizer has no special token {name!r}{there}: add it with SpecialTokens")
        return self.special[name]

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32. Lone surrogates, which UTF-8 cannot represent, become question marks."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of some ids. Special ids are skipped; invalid UTF-8 becomes the replacement character."""
        return b"".join([self._pieces[i] for i in ids]).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class TokenizerSpec(Spec):
    """The specification of a tokenizer. Subclasses live one per file, anywhere importable."""

    multiple: int = dataclasses.field(default=1, kw_only=True)
    """Pads the vocabulary with unused ids to a multiple of this, so that embedding tables divide evenly among devices
    and fill whole tiles."""

    def validate(self):
        self.require(self.multiple >= 1, "multiple", "at least 1")

    @property
    def special(self) -> tuple[str, ...]:
        """Names of its special tokens, without `bos` and `eos`."""
        return ()

    def build(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: if a file that it needs is missing or invalid.
        """
        raise NotImplementedError
