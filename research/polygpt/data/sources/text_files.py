"""Plain text files, read as documents, lines or chunks of fixed size."""

import dataclasses
import glob
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from polygpt.data.example import Example, Text
from polygpt.data.pieces import Pieces
from polygpt.data.sources.base import Source
from polygpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextFiles(Source):
    """UTF-8 text files, with or without a byte-order mark."""

    paths: tuple[str, ...]
    """Files and glob patterns ("texts/**/*.txt")."""
    unit: Literal["document", "line", "chunk"] = "document"
    """One example per file, per non-blank line, or per chunk of a file."""
    bytes: int = 1024
    """Maximum size of a chunk. Chunks never split a character."""

    def validate(self):
        self.require(len(self.paths) > 0, "paths", "at least one file or pattern")
        self.require(self.bytes >= 4, "bytes", "at least 4, the longest character of UTF-8")

    def open(self) -> Sequence[Example]:
        size = {"document": None, "line": "line", "chunk": self.bytes}[self.unit]
        return _TextExamples([Pieces(file, size) for file in find_files(self.paths)])


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that match paths and patterns, each once; those of one pattern are in alphabetical order.

    Raises:
        UserError: if a path does not exist or is a folder, or a pattern matches nothing.
    """
    found = {}
    for path in paths:
        # File names on disk may use composed or decomposed accents, whichever the path uses.
        forms = dict.fromkeys((path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))))
        found_by = ([form] if Path(form).exists() else sorted(glob.glob(form, recursive=True)) for form in forms)
        matches = next(filter(None, found_by), [])
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise UserError(f"no text file {path!r}: give a file or a pattern that matches files")
        found |= dict.fromkeys(files)
    return list(found)


class _TextExamples(Sequence):
    def __init__(self, files: list[Pieces]):
        self._pieces = files  # `files` would be the method that lists media
        self.starts = np.concatenate([[0], np.cumsum([len(file) for file in files])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        file, i = self._pieces[number], i - int(self.starts[number])
        return Example((Text(file.text(i)),), file.place(i))
