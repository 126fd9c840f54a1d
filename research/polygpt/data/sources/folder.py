"""A folder of media with `metadata.jsonl`: the image-folder and audio-folder convention of Hugging Face datasets."""

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from polygpt.data.example import Example, Medium, Text
from polygpt.data.pairs import require_answers
from polygpt.data.pieces import BOM, Pieces, is_blank
from polygpt.data.sources.base import Source
from polygpt.errors import BadRecord, UserError
from polygpt.spec import nearest

METADATA = "metadata.jsonl"
MODALITIES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3"), "audio"),
}
"""Modality by file extension in lower case."""
FIELDS = ("file_name", "file_names", "text", "prompt", "chosen", "rejected")
TEXTS = ("text", "prompt", "chosen", "rejected")
PLACEHOLDER = re.compile(r"(\\*)<(image|audio)>")
NOT_LINES = re.compile(rb"\s*(\[\s*\{|\[\s*\n|\{\s*\n)")
"""The beginning of a file that holds a single JSON document instead of one object per line."""


@dataclasses.dataclass(frozen=True)
class MediaFolder(Source):
    r"""A folder with `metadata.jsonl`: one JSON object per line, `{"file_name": "cat.png", "text": "a cat"}`. Blank
    lines are skipped.

    `text` is the answer to learn; the optional `prompt` precedes it. `file_names` lists several media in place of
    `file_name`; a row may also have none. The n-th `<image>` in a prompt stands for the row's n-th image, the n-th
    `<audio>` for its n-th recording, and `\<image>` for the literal tag (`\\<image>` in JSON). Media of a modality
    without placeholders come first; a tag of a modality that the row lacks is plain text.

    A pair for preference objectives has `chosen` and `rejected` in place of `text`: two different answers to its
    prompt, in which tags are plain text. The layout must be one of pairs (`data.layout.pairs`) to read both.
    """

    path: str
    """The folder."""
    prompt: str = ""
    """The prompt of rows without one; may contain placeholders: "Transcribe: <audio>"."""
    text_placeholders: bool = False
    """Whether placeholders also stand for media in `text`, as in interleaved documents. By default a tag in an answer
    is plain text."""
    follow_links: bool = False
    """Whether to follow symbolic links out of the folder, as in hub caches."""
    ignore: tuple[str, ...] = ()
    """Metadata fields to ignore. Any other unknown field makes its row a bad record."""
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Metadata fields that are labels of the whole example: the names of its classes, in the order of their numbers, or
    [] if it holds numbers. The name of a class becomes its number, a list of names a list of 0 and 1, one per class. A
    row may lack labels, and then has none of that name; a row with labels may lack `text`."""

    def validate(self):
        read = [name for name in self.labels if name in FIELDS or name in self.ignore]
        self.require(not read, "labels", f"fields other than {', '.join((*FIELDS, *self.ignore))}")

    def open(self) -> Sequence[Example]:
        """The examples, one per non-blank line of the metadata.

        Raises:
            UserError: if the folder or its metadata does not exist, the metadata is a link out of the folder, or it is
                not in JSON Lines format.
        """
        folder = Path(self.path)
        if not folder.is_dir():
            raise UserError(f"no folder {self.path!r}: set this source's path to the folder with {METADATA}")
        metadata = folder / METADATA
        if not metadata.is_file():
            raise UserError(f"{folder}: no {METADATA}, which lists the files and their texts")
        target = metadata.resolve()
        if not self.follow_links and not target.is_relative_to(folder.resolve()):
            raise UserError(f"{metadata} is a link to {target}: set follow_links=True to read what links lead to")
        try:
            with metadata.open("rb") as file:
                head = file.read(4096).removeprefix(BOM)
        except OSError as error:
            raise UserError(f"{metadata}: cannot be read: {error.strerror}") from error
        if wrong := NOT_LINES.match(head):
            program = "jq -c '.[]'" if wrong[1].startswith(b"[") else "jq -c ."
            raise UserError(
                f"{metadata}: it must hold one JSON object per line: convert it, with `{program}` for instance"
            )
        return _FolderExamples(self, folder.resolve(), Pieces(metadata, "line"))


class _FolderExamples(Sequence):
    def __init__(self, spec: MediaFolder, folder: Path, lines: Pieces):
        self.spec, self.folder, self.lines = spec, folder, lines

    def files(self) -> Iterator[Path]:
        """The media files in the folder, as examples name them."""
        for root, _, names in os.walk(self.folder, followlinks=self.spec.follow_links):
            for name in sorted(names):
                if PurePath(name).suffix.lower() in MODALITIES:
                    yield Path(root, name).resolve()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        place = self.lines.place(i)
        row = self._row(i, place)
        names = row.get("file_names", [row["file_name"]] if "file_name" in row else [])
        media = [self._medium(name, place) for name in names]
        present = {medium.modality for medium in media}
        prompt = _marked(row.get("prompt", self.spec.prompt), present)
        labels = {name: self._label(name, row[name], place) for name in self.spec.labels if name in row}
        rejected = row.get("rejected")
        if rejected is not None or "chosen" in row:
            require_answers(row.get("chosen"), rejected, place)
        written = row.get("chosen", row.get("text", ""))
        split = self.spec.text_placeholders and rejected is None
        text = _marked(written, present) if split else [written]
        if all(is_blank(piece) for piece in text[::2]) and ("text" in row or not labels):
            raise BadRecord("empty text", place, "" if "text" in row else "the row has no field 'text'")
        return Example(_interleave([(prompt, 0.0), (text, 1.0)], media, place), place, labels, rejected)

    def _label(self, name: str, value: Any, place: str) -> Any:
        """A label with the names of classes replaced by numbers."""
        classes = self.spec.labels[name]

        def number(one: Any) -> int:
            if one not in classes:
                there = nearest(str(one), classes)
                remedy = f"{there}; list all classes in this source's `labels`"
                raise BadRecord("malformed label", place, f"{name} is {one!r}: {remedy}")
            return classes.index(one)

        if not classes or value is None:
            return value
        if not isinstance(value, list):
            return number(value)
        chosen = set(map(number, value))
        return [int(i in chosen) for i in range(len(classes))]

    def _row(self, i: int, place: str) -> dict:
        """A line of the metadata, with its fields checked."""
        line = self.lines.text(i)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecord("malformed JSON", place, str(error)) from error
        if not isinstance(row, dict):
            raise BadRecord("malformed metadata", place, f"it must be an object with {', '.join(FIELDS)}")
        if "file_name" in row and "file_names" in row:
            raise BadRecord("malformed metadata", place, "both file_name and file_names")
        if "chosen" in row and "text" in row:
            raise BadRecord("malformed metadata", place, "both text and chosen")
        names = row.get("file_names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadRecord("malformed metadata", place, f"file_names is {names!r}: it must be a list of strings")
        for key in ("file_name", *TEXTS):
            if key in row and not isinstance(row[key], str):
                raise BadRecord("malformed metadata", place, f"{key} is {row[key]!r}: it must be a string")
        for key in row:
            if key not in FIELDS and key not in self.spec.ignore and key not in self.spec.labels:
                raise BadRecord("unread field", place, self._unread(key, row[key]))
        for key in TEXTS:
            if any("\ud800" <= letter <= "\udfff" for letter in row.get(key, "")):
                raise BadRecord("invalid UTF-8", place, f"{key} holds half of a surrogate pair")
        return row

    def _unread(self, key: str, value) -> str:
        """The reason for rejecting an unread field."""
        names = [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
        for name in names:
            if PurePath(name).suffix.lower() in MODALITIES and os.path.isfile(self.folder / name):
                return f"{key!r} names the file {name!r}: call the field file_name, or list files in file_names"
        return f"{key!r}: {nearest(key, FIELDS)}; list fields to ignore in this source's `ignore`, labels in `labels`"

    def _medium(self, name: str, place: str) -> Medium:
        modality = MODALITIES.get(PurePath(name).suffix.lower())  # of the given name: a link may lead to a hash
        path = _spelled(self.folder, name)
        try:
            target = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links
            raise BadRecord("malformed metadata", place, f"{name!r} is not a file name: {error}") from error
        if not Path(os.path.normpath(path)).is_relative_to(self.folder):
            raise BadRecord("outside the folder", place, repr(name))
        if not self.spec.follow_links and not target.is_relative_to(self.folder):
            detail = f"{name!r} is a link to {target}: set follow_links=True to read what links lead to"
            raise BadRecord("outside the folder", place, detail)
        if modality is None:
            raise BadRecord("unknown file type", place, f"{name!r}: its extension is none of {', '.join(MODALITIES)}")
        return Medium(modality, target)


def _spelled(folder: Path, name: str) -> Path:
    """A path below `folder`, with accents composed or decomposed (NFC, NFD) as in the file names on disk."""
    if name.isascii():
        return folder / name
    path = folder
    for part in PurePath(name).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        path /= next((form for form in forms if os.path.lexists(path / form)), part)
    return path


def _marked(piece: str, present: Collection[str]) -> list[str]:
    """Splits a text at its placeholders: texts at even indices, modalities at odd ones."""
    parts, text, at = [], "", 0
    for match in PLACEHOLDER.finditer(piece):
        backslashes, modality = match.groups()
        text += piece[at : match.start()] + "\\" * (len(backslashes) // 2)
        at = match.end()
        if len(backslashes) % 2 or modality not in present:
            text += f"<{modality}>"
        else:
            parts += [text, modality]
            text = ""
    return [*parts, text + piece[at:]]


def _interleave(pieces: list[tuple[list[str], float]], media: list[Medium], place: str) -> tuple[Text | Medium, ...]:
    """Replaces the placeholders of split texts (with their weights) by media; media without placeholders come first."""
    stated = [modality for piece, _ in pieces for modality in piece[1::2]]
    parts = [medium for medium in media if medium.modality not in stated]
    waiting = {m: [medium for medium in media if medium.modality == m] for m in set(stated)}
    for modality, items in waiting.items():
        if (count := stated.count(modality)) != len(items):
            detail = (
                rf"{count} <{modality}> for {len(items)} {modality} file(s): \<{modality}> stands for the tag itself"
            )
            raise BadRecord("placeholders", place, detail)
    for piece, weight in pieces:
        for i, part in enumerate(piece):
            if i % 2:
                parts.append(waiting[part].pop(0))
            elif part:
                parts.append(Text(part, weight))
    return tuple(parts)
