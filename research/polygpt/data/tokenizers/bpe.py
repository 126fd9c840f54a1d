"""Byte-pair encoding over bytes, trained with Hugging Face's tokenizers and kept as one JSON file."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from polygpt.data.tokenizers.base import Tokenizer, TokenizerSpec
from polygpt.errors import UserError
from polygpt.files import write_atomically

SPECIALS = 2
SMALLEST = 256 + SPECIALS
"""The smallest vocabulary: every byte and the specials."""


@dataclasses.dataclass(frozen=True)
class BPE(TokenizerSpec):
    """Byte-level BPE as in GPT-2 ("Language Models are Unsupervised Multitask Learners", section 2.2)."""

    file: str
    """The JSON file that `polygpt tokenizer train` wrote."""

    def build(self) -> Tokenizer:
        path = Path(self.file)
        if not path.is_file():
            raise UserError(f"no tokenizer file {path}: `polygpt tokenizer train` writes one")
        try:
            model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            return BPETokenizer(model).padded(self.multiple)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer file: {' '.join(str(error).split())}") from error


class BPETokenizer(Tokenizer):
    """See `BPE`. The specials are not known to the underlying model, so that no text can be encoded to them."""

    def __init__(self, model: tokenizers.Tokenizer):
        """Raises UserError if the model could turn a text into anything that does not decode to it again."""
        if not isinstance(model.model, models.BPE) or not isinstance(model.pre_tokenizer, pre_tokenizers.ByteLevel):
            raise UserError("not a byte-level BPE")
        if model.pre_tokenizer.add_prefix_space or model.normalizer is not None:
            raise UserError("it changes the text before encoding it, which would then not be read back")
        if model.get_added_tokens_decoder():
            raise UserError("it has added tokens, which a text could contain: train it without")
        if model.truncation or model.padding or model.post_processor or model.model.dropout:
            raise UserError("it pads, truncates, drops or adds tokens: train it without")
        vocabulary = model.get_vocab()
        ordered = sorted(vocabulary, key=vocabulary.get)
        if sorted(vocabulary.values()) != list(range(len(ordered))):
            raise UserError("its ids are not consecutive")
        missing = set(_BYTES) - set(vocabulary)
        if missing:
            raise UserError(f"{len(missing)} of the 256 bytes have no token")
        super().__init__([bytes(_BYTES[letter] for letter in token) for token in ordered])
        self._model = model

    def encode(self, text: str) -> np.ndarray:
        text = text.encode("utf-8", "replace").decode("utf-8")
        return np.array(self._model.encode(text).ids, np.int32)


def train_bpe(files: Sequence[str | Path], vocabulary: int, out: str | Path) -> BPE:
    """Trains a tokenizer on text files and writes it; nothing is left half-written.

    Args:
        files: UTF-8 text files.
        vocabulary: the most ids, the two specials included. Small files give fewer.
        out: the JSON file to write.

    Returns:
        The specification of the tokenizer.

    Raises:
        UserError: if the vocabulary is too small, or a file is missing or not UTF-8.
    """
    if vocabulary < SMALLEST:
        raise UserError(f"a BPE vocabulary of {vocabulary} is too small: the bytes and specials alone are {SMALLEST}")
    if not files:
        raise UserError("no text file to train the tokenizer on")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_lines([Path(file) for file in files]), trainer)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model.to_str(pretty=True))
    return BPE(str(out))


def _lines(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            with file.open(encoding="utf-8", newline="") as lines:
                yield from lines
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: invalid UTF-8 near byte {error.start} of a block: {error.reason}") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in the vocabulary file, as GPT-2's `bytes_to_unicode` has it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(v): v for v in printable} | {chr(256 + i): v for i, v in enumerate(others)}


_BYTES = _byte_letters()
