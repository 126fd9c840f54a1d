"""A fetched text corpus: its documents in consecutive pieces that begin and end where a reader would pause."""

import bisect
import dataclasses
import functools
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from polygpt.data.corpora import place
from polygpt.data.example import Example, Text
from polygpt.data.sources.base import Source
from polygpt.errors import UserError

PAUSE = re.compile(r"""[a-z0-9)]{3}[.!?]["')]*\s""")
"""The end of a sentence, and not that of "Mr." or "U.S."."""


@dataclasses.dataclass(frozen=True)
class Corpus(Source):
    """Pieces of the documents of a corpus, which `polygpt data fetch NAME` puts into the cache folder first.

    Whole documents are held out for the test split. The text is ASCII: a character is a byte.
    """

    name: Literal["state-of-the-union"]
    """Which corpus; `polygpt data fetch` lists them with their licences."""
    split: Literal["train", "test"] = "train"
    """Which documents."""
    characters: int = 1022
    """Most characters of a piece. A row of T positions holds T - 2 with byte tokens: `bos` and `eos` take one each."""
    prompt: int = 0
    """Leading characters of a piece that are only read: what generation is to continue. Shorter pieces are left out."""

    def validate(self) -> None:
        self.require(self.characters > 0, "characters", "at least 1")
        self.require(0 <= self.prompt < self.characters, "prompt", f"from 0 to characters - 1 = {self.characters - 1}")

    def open(self) -> "CorpusExamples":
        """The examples, in the order of the documents' names.

        Raises:
            UserError: if the corpus has not been fetched, with the command that does it.
        """
        folder = place(self.name)
        if not folder.is_dir():
            raise UserError(
                f"the corpus {self.name} is not in {folder.parent}: fetch it with: polygpt data fetch {self.name}"
            )
        return CorpusExamples(self, folder / self.split)


class CorpusExamples(Sequence[Example]):
    """The pieces, by random access. Light to pickle: each process reads the documents on first use."""

    def __init__(self, spec: Corpus, folder: Path):
        self.spec, self.folder = spec, folder

    def __len__(self) -> int:
        return len(_pieces(self.folder, self.spec.characters, self.spec.prompt))

    def __getitem__(self, index: int) -> Example:
        pieces = _pieces(self.folder, self.spec.characters, self.spec.prompt)
        i = operator.index(index)
        if not -len(pieces) <= i < len(pieces):
            raise IndexError(f"example {index} of {len(pieces)}")
        document, start, end = map(int, pieces[i])
        name, text = _documents(self.folder)[document]
        middle = start + self.spec.prompt
        prompt = (Text(text[start:middle], 0.0),) if self.spec.prompt else ()
        where = f"{self.spec.name}/{self.spec.split}, {name}, characters {start} to {end}"
        return Example((*prompt, Text(text[middle:end])), where)


@functools.lru_cache(maxsize=8)
def _documents(folder: Path) -> list[tuple[str, str]]:
    """(name, text) of the documents of a split, in alphabetical order."""
    files = sorted(folder.glob("*.txt"))
    return [(file.stem, file.read_text(encoding="utf-8").rstrip()) for file in files]


@functools.lru_cache(maxsize=64)
def _pieces(folder: Path, characters: int, prompt: int) -> np.ndarray:
    """int32 [pieces, 3]: document, first character, and the one past the last, of pieces longer than the prompt."""
    found = [
        (i, *span)
        for i, (_, text) in enumerate(_documents(folder))
        for span in spans(text, characters)
        if span[1] - span[0] > prompt
    ]
    return np.array(found, np.int32).reshape(-1, 3)


def spans(text: str, characters: int) -> list[tuple[int, int]]:
    """Where the pieces of a document begin and end, the spaces between them left out.

    A piece ends with the last sentence that it holds whole, where that fills half of it or more; else with the last
    such word; else where it is full.
    """
    pauses = [match.end() - 1 for match in PAUSE.finditer(text)]
    found, start = [], 0
    while start < len(text):
        full = start + characters
        end = min(full, len(text))
        if full < len(text):
            last = bisect.bisect_right(pauses, full) - 1
            sentence = pauses[last] if last >= 0 else -1
            fits = [cut for cut in (sentence, text.rfind(" ", start, full + 1)) if 2 * (cut - start) >= characters]
            end = next(iter(fits), full)
        found.append((start, end))
        start = end + (text[end : end + 1] == " ")
    return found
