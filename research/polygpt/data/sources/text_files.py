"""Plain text files: a document, a line or a piece of fixed size is an example."""

import dataclasses
import functools
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from polygpt.data.example import Example, Text
from polygpt.data.sources.base import Source
from polygpt.errors import BadRecord, UserError

VISIBLE = np.array([not chr(byte).isspace() for byte in range(128)] + [True] * 128)
"""Whether a byte is other than white space, by its value."""


@dataclasses.dataclass(frozen=True)
class TextFiles(Source):
    """UTF-8 text files."""

    paths: tuple[str, ...]
    """Files and glob patterns ("texts/**/*.txt")."""
    unit: Literal["document", "line", "chunk"] = "document"
    """What an example is: a whole file, a line that is not blank, or successive pieces of `bytes` bytes of a file."""
    bytes: int = 1024
    """Size of a piece where the unit is "chunk". A piece ends before a character that would cross its end."""

    def validate(self):
        self.require(len(self.paths) > 0, "paths", "at least one file or pattern")
        self.require(self.bytes >= 4, "bytes", "at least 4, the longest character of UTF-8")

    def open(self) -> Sequence[Example]:
        size = {"document": None, "line": "line", "chunk": self.bytes}[self.unit]
        return _TextExamples([Pieces(file, size) for file in find_files(self.paths)])


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths and patterns mean, each once, those of a pattern in alphabetical order.

    Raises:
        UserError: if a path does not exist or is a folder, or a pattern matches nothing.
    """
    found = {}
    for path in paths:
        matches = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise UserError(f"no text file {path!r}: give a file or a pattern that matches files")
        found |= dict.fromkeys(files)
    return list(found)


class Pieces:
    """Random access to the pieces of a file, which is read once to find them and then a piece at a time.

    Lines of white space alone (that of ASCII) are left out; the others keep their numbers.
    """

    def __init__(self, file: Path, size: int | Literal["line"] | None):
        """Args: size: "line", bytes a piece, or None for the whole file."""
        self.file, self.size = file, size

    @functools.cached_property
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """int64: where each piece ends, in bytes, blank lines too; int64 [len(self)]: which of them are given.

        Raises:
            UserError: if the file cannot be read.
        """
        try:
            total = self.file.stat().st_size
            if self.size is None:
                return np.array([total]), np.array([0])
            if total == 0:
                return np.zeros(0, np.int64), np.zeros(0, np.int64)
            data = np.memmap(self.file, np.uint8, "r")
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from error
        if self.size == "line":
            ends = np.flatnonzero(data == ord("\n")) + 1
            if not len(ends) or ends[-1] < total:
                ends = np.append(ends, total)
            starts = np.append(0, ends[:-1])
            return ends, np.flatnonzero(np.logical_or.reduceat(VISIBLE[data], starts))
        ends, end = [], 0
        while end < total:
            start, end = end, end + self.size
            if end < total:
                while end > start + 1 and data[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
            ends.append(min(end, total))
        return np.array(ends), np.arange(len(ends))

    def __len__(self) -> int:
        return len(self.index[1])

    def place(self, i: int) -> str:
        """The piece as a person would look it up."""
        if self.size is None:
            return str(self.file)
        return f"{self.file}, {'line' if self.size == 'line' else 'piece'} {self.index[1][i] + 1}"

    def text(self, i: int) -> str:
        """A piece; a line without its end.

        Raises:
            BadRecord: if it is empty, not UTF-8, or the file is gone.
        """
        ends, given = self.index
        number = given[i]
        start, end = int(ends[number - 1]) if number else 0, int(ends[number])
        try:
            with self.file.open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
        except FileNotFoundError:
            raise BadRecord("missing file", self.place(i)) from None
        except OSError as error:
            raise BadRecord("unreadable file", self.place(i), error.strerror) from error
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord("invalid UTF-8", self.place(i), f"byte {start + error.start} of the file") from error
        if self.size == "line":
            text = text.removesuffix("\n").removesuffix("\r")
        if not text.strip():
            raise BadRecord("empty text", self.place(i))
        return text


class _TextExamples(Sequence):
    def __init__(self, files: list[Pieces]):
        self.files = files
        self.starts = np.concatenate([[0], np.cumsum([len(file) for file in files])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        file, i = self.files[number], i - int(self.starts[number])
        return Example((Text(file.text(i)),), file.place(i))
