"""What a data source returns: examples, each a sequence of texts and media in reading order."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text, or a special token.

    Attributes:
        text: the text, of any length, or the name of the special token.
        weight: loss weight of its tokens. 0 marks a prompt, which the model reads and is not scored on.
        labels: labels of each of its tokens, as in `Example`.
        special: whether it is one of the tokenizer's special tokens; see `SpecialTokens`.
    """

    text: str
    weight: float = 1.0
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    special: bool = False


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image, a recording or another item of media, still encoded.

    Attributes:
        modality: the name of the adapter that reads it, such as "image" or "audio".
        source: the encoded bytes (PNG, FLAC, ...), or the path of a file with them; text becomes a path.
    """

    modality: str
    source: bytes | Path | str

    def __post_init__(self):
        if isinstance(self.source, str):
            object.__setattr__(self, "source", Path(self.source))


@dataclasses.dataclass(frozen=True)
class Example:
    """Texts and media in the order in which the model reads them.

    Attributes:
        parts: the texts and media.
        place: the file and the record, as error messages name them.
        labels: labels of the whole example, by name: a number or a list of numbers, with None or NaN where there is
            none. `LayoutSpec.labels` declares them. They are placed at the last position, `eos`.
        rejected: an answer to the same prompt that is worse than `answer`; None if there is none.
    """

    parts: tuple[Text | Medium, ...]
    place: str
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    rejected: str | None = None

    @property
    def labelled(self) -> bool:
        """Whether it or one of its texts has labels."""
        return bool(self.labels) or any(isinstance(part, Text) and part.labels for part in self.parts)

    @property
    def prompt(self) -> tuple[Text | Medium, ...]:
        """The parts before the first text of positive weight, from which generation starts."""
        for i, part in enumerate(self.parts):
            if isinstance(part, Text) and part.weight > 0:
                return self.parts[:i]
        return self.parts

    @property
    def answer(self) -> str:
        """The texts of positive weight, joined, with which generated text is compared. It has no special tokens."""
        return "".join(
            part.text for part in self.parts if isinstance(part, Text) and part.weight > 0 and not part.special
        )

    @property
    def with_rejected(self) -> "Example":
        """The prompt with the rejected answer in place of the preferred one, without labels."""
        return Example((*self.prompt, Text(self.rejected)), self.place)
