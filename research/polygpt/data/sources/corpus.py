"""A downloaded text corpus, cut into consecutive pieces at sentence ends."""

import bisect
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from polygpt.data.corpora import place
from polygpt.data.example import Example, Text
from polygpt.data.sources.base import Source, index_within
from polygpt.errors import UserError

PAUSE = re.compile(r"""[a-z0-9)]{3}[.!?]["')]*\s""")
"""The end of a sentence; does not match "Mr." and "U.S."."""


@dataclasses.dataclass(frozen=True)
class Corpus(Source):
    """Pieces of the documents of a corpus that `polygpt data fetch NAME` has downloaded.

    Whole documents are held out for the test split. The text is ASCII, so one character is one byte.
    """

    name: Literal["state-of-the-union"]
    """The corpus; `polygpt data fetch` lists all with their licences."""
    split: Literal["train", "test"] = "train"
    """The split of the documents."""
    characters: int = 1022
    """Largest number of characters per piece. A row of T positions fits T - 2 byte tokens."""
    prompt: int = 0
    """Number of leading characters that form a prompt for generation. Shorter pieces are left out."""

    def validate(self) -> None:
        self.require(self.characters > 0, "characters", "at least 1")
        self.require(0 <= self.prompt < self.characters, "prompt", f"from 0 to characters - 1 = {self.characters - 1}")

    def open(self) -> "CorpusExamples":
        """The examples, in the order of the documents' names.

        Raises:
            UserError: if the corpus has not been fetched; the message gives the command.
        """
        folder = place(self.name)
        if not folder.is_dir():
            raise UserError(
                f"the corpus {self.name} is not in {folder.parent}: fetch it with: polygpt data fetch {self.name}"
            )
        return CorpusExamples(self, folder / self.split)


class CorpusExamples(Sequence[Example]):
    """Random access to the pieces. Cheap to pickle: each process reads the documents on first use."""

    def __init__(self, spec: Corpus, folder: Path):
        self.spec, self.folder = spec, folder

    def __len__(self) -> int:
        return len(_pieces(self.folder, self.spec.characters, self.spec.prompt))

    def __getitem__(self, index: int) -> Example:
        pieces = _pieces(self.folder, self.spec.characters, self.spec.prompt)
        document, start, end = map(int, pieces[index_within(index, len(pieces))])
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
    """int32 [pieces, 3]: document, start and end of each piece that is longer than the prompt."""
    found = [
        (i, *span)
        for i, (_, text) in enumerate(_documents(folder))
        for span in spans(text, characters)
        if span[1] - span[0] > prompt
    ]
    return np.array(found, np.int32).reshape(-1, 3)


def spans(text: str, characters: int) -> list[tuple[int, int]]:
    """(start, end) of the pieces of a document, without the spaces between them.

    A piece ends after its last complete sentence if it is then at least half full, else after its last complete word if
    it is then at least half full, else at `characters`.
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
