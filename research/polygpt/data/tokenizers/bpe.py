"""Byte-pair encoding over bytes, trained with Hugging Face's tokenizers and stored as one JSON file."""

import dataclasses
import functools
import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from polygpt.data.pieces import convert, foreign_encoding
from polygpt.data.tokenizers import ranked
from polygpt.data.tokenizers.base import Tokenizer, TokenizerSpec
from polygpt.errors import UserError
from polygpt.files import write_atomically

SPECIALS = 2
SMALLEST = 256 + SPECIALS
"""The smallest vocabulary: every byte and the specials."""
PIECE = 256
"""Maximum number of characters per training piece, a run with or without white space. The cost of training is quadratic
in the longest piece, and genomes, base64 and some languages have no spaces."""
LONG = re.compile(rf"(?<!\S)\S{{{PIECE + 1},}}|(?<!\s)\s{{{PIECE + 1},}}")
LINE = 1 << 20
"""Characters read at a time from a line."""

Progress = Callable[[str, int, int], None]
"""Called with the current activity, the amount done and the total amount, in MB of text."""


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
    """See `BPE`. The underlying model does not know the special tokens, so no text can be encoded to them.

    Attributes:
        ranked: the same encoding by tiktoken, for texts of ordinary length; None if it could differ.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        """Raises UserError if the model could encode a text to anything that does not decode to the same text."""
        if not isinstance(model.model, models.BPE) or not isinstance(model.pre_tokenizer, pre_tokenizers.ByteLevel):
            raise UserError("not a byte-level BPE")
        if model.pre_tokenizer.add_prefix_space or model.normalizer is not None:
            raise UserError("it changes the text before encoding it, so the text could not be decoded again")
        if model.get_added_tokens_decoder():
            raise UserError("it has added tokens, which a text could contain: train it without them")
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
        self._model, self.ranked = model, ranked.ranked(model, _BYTES)

    def encode(self, text: str) -> np.ndarray:
        text = text.encode("utf-8", "replace").decode("utf-8")
        if self.ranked is None or len(text) > ranked.LONGEST:
            return np.array(self._model.encode(text).ids, np.int32)
        return np.array(self.ranked.encode_ordinary(text), np.int32)


def train_bpe(
    files: Sequence[str | Path],
    vocabulary: int,
    out: str | Path,
    progress: Progress = lambda what, done, total: None,
) -> BPE:
    """Trains a tokenizer on text files and writes it atomically.

    Args:
        files: UTF-8 text files.
        vocabulary: maximum number of ids, including the two special ids. Small files give fewer.
        out: the JSON file to write.
        progress: called several times per second; an exception that it raises ends training.

    Returns:
        The specification of the tokenizer.

    Raises:
        UserError: if the vocabulary is too small, or a file is missing or not UTF-8.
    """
    if vocabulary < SMALLEST:
        raise UserError(f"a BPE vocabulary of {vocabulary} is too small: bytes and special ids need {SMALLEST}")
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
    texts = _Texts([Path(file) for file in files])
    _interruptible(lambda: model.train_from_iterator(texts, trainer), texts, progress)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model.to_str(pretty=True))
    return BPE(str(out))


def _interruptible(train: Callable[[], None], texts: "_Texts", progress: Progress) -> None:
    """Runs `train` in a thread, because the library's native loops do not respond to Ctrl+C."""
    failure: list[BaseException] = []

    def run():
        try:
            train()
        except BaseException as error:
            failure.append(error)

    thread, merging = threading.Thread(target=run, daemon=True), None
    thread.start()
    try:
        alive = True
        while alive:
            alive = thread.is_alive()
            if texts.ended and merging is None:
                merging = time.monotonic()
            what = "reading, MB" if merging is None else f"merging pairs, {time.monotonic() - merging:.0f} s"
            progress(what, texts.done // 10**6, texts.total // 10**6)
            thread.join(0.1)
    finally:
        texts.stopped = True
        thread.join(0 if texts.ended else 10)
    if failure:
        raise failure[0]


class _Texts:
    """The text of files for training, in pieces.

    Attributes:
        done, total: number of bytes read so far, and in all files.
        ended: whether everything has been read.
        stopped: set from another thread to make the reading fail.
    """

    def __init__(self, files: list[Path]):
        self.files, self.done, self.ended, self.stopped = files, 0, False, False
        self.total = sum(map(_size, files))

    def __iter__(self) -> Iterator[str]:
        before = 0
        for file in self.files:
            try:
                with file.open("rb") as raw:
                    if encoding := foreign_encoding(raw.read(4096)):
                        raise UserError(f"{file}: {convert(encoding)}")
                    raw.seek(0)
                    lines = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
                    for number, line in enumerate(iter(functools.partial(lines.readline, LINE), "")):
                        if number % 256 == 0:
                            self.done = before + raw.tell()
                            if self.stopped:
                                raise InterruptedError
                        yield from _bounded(line)
                    before += raw.tell()
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: invalid UTF-8 near byte {error.start} of a block: {error.reason}") from error
            except OSError as error:
                raise _unreadable(file, error) from error
        self.ended = True


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read: {error.strerror}")


def _bounded(line: str) -> Iterator[str]:
    """Splits a line only inside runs longer than PIECE, so that other pieces are the same as GPT-2's."""
    start = 0
    for stretch in LONG.finditer(line) if len(line) > PIECE else ():
        for cut in range(stretch.start() + PIECE, stretch.end(), PIECE):
            yield line[start:cut]
            start = cut
    yield line[start:] if start else line


def _byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in the vocabulary file, as in GPT-2's `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(v): v for v in printable} | {chr(256 + i): v for i, v in enumerate(others)}


_BYTES = _byte_letters()
