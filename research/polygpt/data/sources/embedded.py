"""The datasets that ship with the package: written and spoken digits, sums, captions, transcripts and text."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from polygpt.data.example import Example, Medium, Text
from polygpt.data.sources.base import Source, index_within

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen"
).split()


@dataclasses.dataclass(frozen=True)
class Embedded(Source):
    """One task of the embedded data. Except in the task text, only the answer (bold) has a loss weight.

    | task | example | label |
    |---|---|---|
    | text | a piece of the King James Bible or of WordNet's definitions | `corpus`: 0 or 1 |
    | digits | image of a handwritten digit `=` **seven** | `number`: 0 to 9 |
    | pictures | clip art `:` **christmas tree** | |
    | speech | recording of a number `=` **seven** (in the language spoken) | `number`: 0 to 9, or to 20 |
    | utterances | recording `:` **Thank you for calling** | |
    | fusion | image of a digit `+` recording of another `=` **twelve**, in either order | `number`: 0 to 18 |
    | sums | image of a digit `+five=` **twelve** | `number`: 0 to 18 |

    The images, voices and texts of the test split do not occur in the training split.
    """

    task: Literal["text", "digits", "pictures", "speech", "utterances", "fusion", "sums"]
    """The task."""
    split: Literal["train", "test"] = "train"
    """The split."""
    languages: tuple[Literal["en", "es", "fr", "it", "ru"], ...] = ("en",)
    """Languages of the recordings. In the fusion task the answer is always English."""
    numbers: Literal["digits", "all"] = "digits"
    """Numbers of the speech task: zero to nine, or also the English numbers up to twenty."""
    seconds: float = 3.0
    """Longer recordings are left out. English numbers last at most 0.96 s, others 1.2 s, utterances 3 s."""
    examples: int = 100_000
    """Number of pairs in the fusion and sums tasks. Pair `i` depends only on the split, the seed and `i`."""
    characters: int = 256
    """Number of characters per piece of text."""
    prompt: int = 0
    """Number of leading characters of a piece that form a prompt for generation."""
    seed: int = 0
    """Random seed of the pairs."""
    labels: bool = False
    """Whether the answer is a label (last column) and not a text. Pieces of text keep their text."""

    def validate(self) -> None:
        self.require(len(self.languages) > 0, "languages", "at least one language")
        self.require(
            not self.labels or self.task not in ("pictures", "utterances"), "labels", f"false: {self.task} have none"
        )
        self.require(self.seconds > 0, "seconds", "above 0")
        self.require(self.examples > 0, "examples", "at least 1")
        self.require(self.characters > 0, "characters", "at least 1")
        self.require(0 <= self.prompt < self.characters, "prompt", f"from 0 to characters - 1 = {self.characters - 1}")

    def open(self) -> "EmbeddedExamples":
        """The examples. The first use on a machine builds the dataset in the cache folder, which takes a few seconds.

        Raises:
            UserError: if the cache folder cannot be written.
        """
        return EmbeddedExamples(self)


class EmbeddedExamples(Sequence[Example]):
    """Random access to the examples of one task. Cheap to pickle: each process reads the records on first use."""

    def __init__(self, spec: Embedded):
        self.spec = spec

    def __len__(self) -> int:
        return _open(self.spec)[0]

    def __getitem__(self, index: int) -> Example:
        length, make = _open(self.spec)
        i = index_within(index, length)
        parts, file, label = make(i)
        place = f"embedded {self.spec.task}/{self.spec.split}, example {i}: {file}"
        if not self.spec.labels:
            return Example(parts, place)
        if self.spec.task == "text":
            return Example(parts, place, {"corpus": label})
        return Example(parts[:-1], place, {"number": label})


Maker = Callable[[int], tuple[tuple[Text | Medium, ...], str, int]]


@functools.lru_cache(maxsize=64)
def _open(spec: Embedded) -> tuple[int, Maker]:
    """(number of examples, a function from an index to the parts, the file and the label of an example)."""
    if spec.task == "text":
        pieces = _pieces(_records(spec, "text"), spec.characters)

        def make_text(i):
            file, text, source = pieces[i]
            prompt = (Text(text[: spec.prompt], 0.0),) if spec.prompt else ()
            return (*prompt, Text(text[spec.prompt :])), file, int(source != "bible")

        return len(pieces), make_text
    if spec.task == "fusion":
        pictures, recordings = _records(spec, "digits"), _spoken(spec, "digits")
        return spec.examples, functools.partial(_seen_and_heard, spec, pictures, recordings)
    if spec.task == "sums":
        return spec.examples, functools.partial(_seen_and_read, spec, _records(spec, "digits"))
    if spec.task == "digits":
        rows, modality, sign = _records(spec, "digits"), "image", "="
        answers = [NUMBERS[row["number"]] for row in rows]
    elif spec.task == "speech":
        rows, modality, sign = _spoken(spec, spec.numbers), "audio", "="
        answers = [row["word"] for row in rows]
    else:
        rows, sign = _records(spec, spec.task), ":"
        modality = "image" if spec.task == "pictures" else "audio"
        answers = [row["text"] for row in rows]

    def make(i):
        parts = Medium(modality, rows[i][modality]), Text(sign, 0.0), Text(answers[i])
        return parts, rows[i]["file"], rows[i].get("number", 0)

    return len(rows), make


def _records(spec: Embedded, config: str) -> list[dict[str, Any]]:
    from polygpt.data.embedded.builder import records  # imports TFDS, which takes a second

    return [
        row
        for row in records(config, spec.split)
        if "audio" not in row or row["language"] in spec.languages and _seconds(row["audio"]) <= spec.seconds
    ]


def _seconds(flac: bytes) -> float:
    """The duration of a recording, from the header of the FLAC file (RFC 9639, section 8.2)."""
    rate_to_total = int.from_bytes(flac[18:26])  # bits: 20 sample rate, 3 channels, 5 sample size, 36 total samples
    return (rate_to_total & (1 << 36) - 1) / (rate_to_total >> 44)


def _spoken(spec: Embedded, numbers: str) -> list[dict[str, Any]]:
    return [row for row in _records(spec, "speech") if numbers == "all" or row["number"] < 10]


def _pieces(documents: list[dict[str, Any]], characters: int) -> list[tuple[str, str, str]]:
    """(file, text, source) of the pieces of documents. A last piece of less than half the length is left out."""
    pieces = []
    for row in documents:
        text = row["text"]
        for start in range(0, len(text), characters):
            piece = text[start : start + characters]
            if start == 0 or 2 * len(piece) >= characters:
                pieces.append((row["file"], piece, row["source"]))
    return pieces


def _drawn(spec: Embedded, i: int) -> bytes:
    """The random bytes of pair `i`: a hash, so that any pair can be generated without the others."""
    return hashlib.blake2b(f"{spec.seed}/{spec.split}/{i}".encode(), digest_size=17).digest()


def _seen_and_heard(spec: Embedded, pictures, recordings, i: int) -> tuple[tuple[Text | Medium, ...], str, int]:
    """Pair `i` of the fusion task: an image and a recording in either order."""
    digest = _drawn(spec, i)
    picture = pictures[int.from_bytes(digest[:8]) % len(pictures)]
    recording = recordings[int.from_bytes(digest[8:16]) % len(recordings)]
    media = [Medium("image", picture["image"]), Medium("audio", recording["audio"])]
    files = [picture["file"], recording["file"]]
    if digest[16] % 2:
        media.reverse()
        files.reverse()
    total = picture["number"] + recording["number"]
    parts = media[0], Text("+", 0.0), media[1], Text("=", 0.0), Text(NUMBERS[total])
    return parts, " + ".join(files), total


def _seen_and_read(spec: Embedded, pictures, i: int) -> tuple[tuple[Text | Medium, ...], str, int]:
    """Pair `i` of the sums task: an image and a number in words."""
    digest = _drawn(spec, i)
    picture = pictures[int.from_bytes(digest[:8]) % len(pictures)]
    number = int.from_bytes(digest[8:16]) % 10
    total = picture["number"] + number
    parts = Medium("image", picture["image"]), Text(f"+{NUMBERS[number]}=", 0.0), Text(NUMBERS[total])
    return parts, picture["file"], total
