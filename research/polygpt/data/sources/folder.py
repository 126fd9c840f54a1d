"""A folder of media with `metadata.jsonl`: the image-folder and audio-folder convention of Hugging Face datasets."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from polygpt.data.example import Example, Medium, Text
from polygpt.data.pieces import Pieces
from polygpt.data.sources.base import Source
from polygpt.errors import BadRecord, UserError

METADATA = "metadata.jsonl"
MODALITIES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3"), "audio"),
}
"""The modality of a file, by its extension in lower case."""
FIELDS = ("file_name", "file_names", "text", "prompt")
PLACEHOLDER = re.compile("<(image|audio)>")


@dataclasses.dataclass(frozen=True)
class MediaFolder(Source):
    """A folder with `metadata.jsonl`, one JSON object a line: `{"file_name": "cat.png", "text": "a cat"}`; blank
    lines are skipped.

    `file_names` in place of `file_name` lists several media; a row may also have none. `text` is what the model learns
    to write, the optional `prompt` what it reads before. The n-th `<image>` in prompt and text stands for the row's
    n-th picture, the n-th `<audio>` for its n-th recording. Media of a modality that has no placeholder come first.
    In a row without media a placeholder is text like any other. Other fields are ignored.
    """

    path: str
    """The folder."""
    prompt: str = ""
    """The prompt of rows that have none, placeholders included: "Transcribe: <audio>"."""

    def open(self) -> Sequence[Example]:
        folder = Path(self.path)
        if not folder.is_dir():
            raise UserError(f"no folder {self.path!r}: set this source's path to where {METADATA} and its media are")
        if not (folder / METADATA).is_file():
            raise UserError(f"{folder}: no {METADATA}, which lists the files and their texts")
        return _FolderExamples(folder.resolve(), self.prompt, Pieces(folder / METADATA, "line"))


class _FolderExamples(Sequence):
    def __init__(self, folder: Path, prompt: str, lines: Pieces):
        self.folder, self.prompt, self.lines = folder, prompt, lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        place = self.lines.place(i)
        row = self._row(i, place)
        names = row.get("file_names", [row["file_name"]] if "file_name" in row else [])
        media = [self._medium(name, place) for name in names]
        prompt, text = row.get("prompt", self.prompt), row["text"]
        pieces = [(prompt, 0.0), (text, 1.0)]
        if not media:
            return Example(tuple(Text(piece, weight) for piece, weight in pieces if piece), place)
        return Example(_interleave(pieces, media, place), place)

    def _row(self, i: int, place: str) -> dict:
        """A line of the metadata, its fields checked."""
        line = self.lines.text(i)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecord("malformed JSON", place, str(error)) from error
        if not isinstance(row, dict):
            raise BadRecord("malformed metadata", place, f"an object with {', '.join(FIELDS)} is wanted")
        if "file_name" in row and "file_names" in row:
            raise BadRecord("malformed metadata", place, "both file_name and file_names")
        names = row.get("file_names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadRecord("malformed metadata", place, f"file_names is {names!r}: a list of texts is wanted")
        for key in ("file_name", "text", "prompt"):
            if key in row and not isinstance(row[key], str):
                raise BadRecord("malformed metadata", place, f"{key} is {row[key]!r}: a text is wanted")
        if not PLACEHOLDER.sub("", row.get("text", "")).strip():
            raise BadRecord("empty text", place, "" if "text" in row else "the row has no field 'text'")
        for key in ("text", "prompt"):
            if any("\ud800" <= letter <= "\udfff" for letter in row.get(key, "")):
                raise BadRecord("invalid UTF-8", place, f"{key} holds half of a surrogate pair")
        return row

    def _medium(self, name: str, place: str) -> Medium:
        try:
            path = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links
            raise BadRecord("malformed metadata", place, f"{name!r} is no file name: {error}") from error
        if not path.is_relative_to(self.folder):
            raise BadRecord("outside the folder", place, repr(name))
        modality = MODALITIES.get(path.suffix.lower())
        if modality is None:
            raise BadRecord("unknown file type", place, f"{name!r}: its extension is none of {', '.join(MODALITIES)}")
        return Medium(modality, path)


def _interleave(pieces: list[tuple[str, float]], media: list[Medium], place: str) -> tuple[Text | Medium, ...]:
    """Texts with their placeholders exchanged for media; media of a modality without placeholders in front."""
    stated = [modality for piece, _ in pieces for modality in PLACEHOLDER.findall(piece)]
    parts = [medium for medium in media if medium.modality not in stated]
    waiting = {m: [medium for medium in media if medium.modality == m] for m in set(stated)}
    for modality, items in waiting.items():
        if stated.count(modality) != len(items):
            count = stated.count(modality)
            raise BadRecord("placeholders", place, f"{count} <{modality}> in the text for {len(items)} files")
    for piece, weight in pieces:
        for i, part in enumerate(PLACEHOLDER.split(piece)):  # texts and, at odd places, names of modalities
            if i % 2:
                parts.append(waiting[part].pop(0))
            elif part:
                parts.append(Text(part, weight))
    return tuple(parts)
