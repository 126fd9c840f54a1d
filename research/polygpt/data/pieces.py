"""Random access to the lines or chunks of a text file through a table of byte offsets.

The table is built by reading the file in blocks, so memory does not grow with the file. For a large file it is stored
in the cache folder, keyed by the file's path, size and modification time, and memory-mapped: 8 bytes per line or chunk,
plus 8 per line if the file has blank lines.
"""

import functools
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from polygpt.cache_folder import cache_folder, made_whole
from polygpt.errors import BadRecord, UserError

BLOCK = 4 << 20
"""Bytes read at a time while a table is built."""
SMALL = 8 << 20
"""Tables of files up to this many bytes are rebuilt at every start and kept in memory."""
LARGEST = 1 << 30
"""Maximum number of bytes of one piece: larger documents should be read as lines or chunks."""
FORMAT = 1
"""Format version of the stored tables."""

BOM = b"\xef\xbb\xbf"
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte-order marks of other encodings; the longer ones first."""
INVISIBLE = re.compile(r"[\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]*")
"""Invisible text: Unicode white space, and the format characters that occur alone in practice."""
KIND = np.full(256, 2, np.uint8)
"""By byte value: 0 is ASCII white space, 1 may belong to an invisible character, 2 makes its line visible."""
KIND[[byte for byte in range(128) if chr(byte).isspace()]] = 0
KIND[0x80:0xC0] = 1  # continuation bytes
KIND[[0xC2, 0xE1, 0xE2, 0xE3, 0xEF]] = 1  # first bytes of the characters in INVISIBLE

log = logging.getLogger(__name__)


def is_blank(text: str) -> bool:
    """Whether a text is empty or invisible."""
    return INVISIBLE.fullmatch(text) is not None


def foreign_encoding(head: bytes) -> str | None:
    """The encoding of a file that is not UTF-8, from its first bytes: a byte-order mark, or every other byte zero."""
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    zeros = [2 * head[parity::2].count(0) / max(len(head), 32) for parity in (0, 1)]
    return "UTF-16" if max(zeros) > 0.5 and min(zeros) < 0.1 else None


class Pieces:
    """The pieces of a UTF-8 file, without its byte-order mark. Blank lines are left out; the others keep their numbers.
    Cheap to pickle: each process opens or rebuilds the table on first use."""

    def __init__(self, file: Path, unit: int | Literal["line"] | None):
        """Args: unit: "line", the maximum number of bytes per chunk, or None for the whole file."""
        self.file, self.unit = file, unit
        self._seen: tuple[int, int] | None = None  # size and modification time of the file when it was indexed

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "table"}

    @functools.cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Byte offsets where pieces begin and end, including blank lines, int64 [pieces + 1]; and the indices of the
        pieces that are not blank, int64 [len(self)], or None for all.

        Raises:
            UserError: if the file cannot be read, is not UTF-8, or changes meanwhile; or if the cache is not writable.
        """
        try:
            seen = self._stat()
            if self.unit is None:
                return np.array([0, seen[0]]), None
            with self.file.open("rb") as file:
                if encoding := foreign_encoding(file.read(4096)):
                    raise UserError(f"{self.file}: {convert(encoding)}")
            table = self._stored(seen) if seen[0] > SMALL else self._built()
            changed = self._stat() != seen or self._seen not in (None, seen)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror or error}") from error
        if changed:
            raise UserError(f"{self.file}: changed while in use: start again once it is complete")
        self._seen = seen
        return table

    def _stat(self) -> tuple[int, int]:
        status = self.file.stat()
        return status.st_size, status.st_mtime_ns

    def _built(self) -> tuple[np.ndarray, np.ndarray | None]:
        edges, kept = zip(*self._scan(), strict=True)
        edges, kept = np.concatenate(edges), np.concatenate(kept)
        return edges, None if len(kept) == len(edges) - 1 else kept

    def _stored(self, seen: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        key = "\n".join(map(str, (self.file.resolve(), *seen, self.unit, FORMAT)))
        place = cache_folder() / "text" / hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:24]
        if not place.is_dir():
            if seen[0] > LARGEST:
                log.warning("indexing %s, %.1f GB; the index is kept in %s", self.file, seen[0] / 1e9, place.parent)
            try:
                with made_whole(place) as work:
                    with (work / "edges").open("wb") as edges, (work / "kept").open("wb") as kept:
                        for some, numbers in self._scan():
                            edges.write(some)
                            kept.write(numbers)
                        if edges.tell() - 8 == kept.tell():
                            (work / "kept").unlink()
            except OSError as error:
                raise UserError(
                    f"cannot write the index of {self.file} to {place.parent}: {error.strerror or error}: "
                    "set POLYGPT_CACHE to a folder that can be written"
                ) from error
        return _mapped(place / "edges"), _mapped(place / "kept") if (place / "kept").exists() else None

    def _scan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields, block by block, int64 edges of pieces, and int64 indices of the pieces that are not blank."""
        with self.file.open("rb") as file:
            start = len(BOM) if file.read(len(BOM)) == BOM else 0
            yield np.array([start]), np.zeros(0, np.int64)
            yield from _lines(file, start) if self.unit == "line" else _chunks(file, start, self.unit)

    def __len__(self) -> int:
        edges, kept = self.table
        return len(edges) - 1 if kept is None else len(kept)

    def _number(self, i: int) -> int:
        kept = self.table[1]
        return i if kept is None else int(kept[i])

    def place(self, i: int) -> str:
        """The location of a piece, for messages."""
        if self.unit is None:
            return str(self.file)
        return f"{self.file}, {'line' if self.unit == 'line' else 'chunk'} {self._number(i) + 1}"

    def text(self, i: int) -> str:
        """A piece; lines come without their line ending.

        Raises:
            BadRecord: if it is empty, too large or not UTF-8, or the file is gone or has changed since it was indexed.
        """
        edges, number = self.table[0], self._number(i)
        start, end = int(edges[number]), int(edges[number + 1])
        if end - start > LARGEST:
            detail = f"{(end - start) / 1e9:.1f} GB in one piece: unit='line' or unit='chunk' splits it"
            raise BadRecord("too large", self.place(i), detail)
        try:
            with self.file.open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
        except FileNotFoundError:
            raise BadRecord("missing file", self.place(i)) from None
        except OSError as error:
            raise BadRecord("unreadable file", self.place(i), error.strerror) from error
        newline = data.find(b"\n") if self.unit == "line" else len(data) - 1
        if len(data) < end - start or newline != len(data) - 1 and (newline >= 0 or number + 2 < len(edges)):
            raise BadRecord(
                "changed file", self.place(i), "it changed since it was indexed; `touch` it and start again"
            )
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            encoding = foreign_encoding(data[:4096]) if start == 0 else None
            detail = convert(encoding) if encoding else f"byte {start + error.start} of the file"
            raise BadRecord("invalid UTF-8", self.place(i), detail) from error
        if self.unit == "line":
            text = text.removesuffix("\n").removesuffix("\r")
        elif self.unit is None:
            text = text.removeprefix("\ufeff")
        if is_blank(text):
            raise BadRecord("empty text", self.place(i))
        return text


def convert(encoding: str) -> str:
    return f"it is {encoding}: convert it to UTF-8, with `iconv -f {encoding} -t UTF-8` for instance"


def _mapped(file: Path) -> np.ndarray:
    return np.memmap(file, np.int64, "r") if file.stat().st_size else np.zeros(0, np.int64)


def _lines(file: BinaryIO, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Edges of the lines from `start` on, and the indices of those that are not blank."""
    file.seek(start)
    at = begin = start  # start of the block, and of the current line
    kind, number = 0, 0  # of the current line
    while block := file.read(BLOCK):
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n")) + 1
        firsts = np.append(0, ends[:-1] if len(ends) and ends[-1] == len(data) else ends)
        kinds = np.maximum.reduceat(KIND[data], firsts)
        kinds[0] = max(kinds[0], kind)
        kind = int(kinds[-1]) if len(kinds) > len(ends) else 0
        ends, kinds = ends + at, kinds[: len(ends)]
        at += len(data)
        for i in np.flatnonzero(kinds == 1):
            kinds[i] = _visible(file, int(ends[i - 1]) if i else begin, int(ends[i]))
        file.seek(at)
        yield ends, number + np.flatnonzero(kinds)
        number += len(ends)
        begin = int(ends[-1]) if len(ends) else begin
    if begin < at:  # a last line without a line ending
        kept = kind == 2 or kind == 1 and _visible(file, begin, at)
        yield np.array([at]), np.array([number] if kept else [], np.int64)


def _visible(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    return end - start > SMALL or not is_blank(file.read(end - start).decode("utf-8", "replace"))


def _chunks(file: BinaryIO, start: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Edges of chunks of at most `size` bytes; chunks never split a character."""
    number = 0
    while True:
        file.seek(start)
        block = file.read(max(BLOCK, size + 1))
        edges, at = [], 0
        while at + size < len(block):
            cut = at + size
            # A UTF-8 character has at most three continuation bytes.
            at = next((end for end in range(cut, cut - 4, -1) if block[end] & 0xC0 != 0x80), cut)
            edges.append(start + at)
        ended = len(block) < max(BLOCK, size + 1)
        if ended and at < len(block):
            edges.append(start + len(block))
        yield np.array(edges, np.int64), number + np.arange(len(edges))
        if ended:
            return
        start, number = start + at, number + len(edges)
