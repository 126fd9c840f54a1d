"""Order of sentences: to be restored, or to be told from the wrong one."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from polygpt.data.example import Example, Text
from polygpt.data.transforms.base import Transform, at_weight, scored
from polygpt.data.transforms.text_noise import TextNoise
from polygpt.errors import BadRecord

_END = re.compile(r"((?<=[.!?])\s+|\s+\Z)")


def sentences(text: str) -> tuple[list[str], list[str]]:
    """(sentences, the white space after each): a sentence ends with `.`, `!` or `?` before white space, or the text."""
    pieces = [*_END.split(text), ""]
    some, spaces = pieces[::2], pieces[1::2]
    return (some, spaces) if some[-1] or len(some) == 1 else (some[:-1], spaces[:-1])


def _joined(part: Text, some: Sequence[str], order: Iterable[int], spaces: Sequence[str]) -> Text:
    text = "".join(some[i] + space for i, space in zip(order, spaces, strict=True))
    return dataclasses.replace(part, text=text)


@dataclasses.dataclass(frozen=True)
class SentencePermutation(TextNoise):
    """Puts the sentences of a text in a random order. Lewis et al., BART (1910.13461), section 2.2."""

    def change(self, part: Text, rng: np.random.Generator) -> tuple[Text, ...]:
        some, spaces = sentences(part.text)
        order = rng.permutation(len(some))
        return (_joined(part, some, order, spaces),)


@dataclasses.dataclass(frozen=True)
class SentenceOrder(Transform):
    """Sentence-order prediction as text. Lan et al., ALBERT (1909.11942), section 3.1.

    Cuts the first text with a loss weight between two sentences, exchanges the two parts half of the time, and asks
    whether it did. Only the answer has a loss weight: the model should not learn to write texts in the wrong order.
    """

    answers: tuple[str, str] = (" in order", " exchanged")
    """What the model writes."""

    def validate(self):
        self.require(all(self.answers) and self.answers[0] != self.answers[1], "answers", "two different texts")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        at = next((i for i, part in enumerate(example.parts) if scored(part)), None)
        if at is None:
            return example
        part = example.parts[at]
        some, spaces = sentences(part.text)
        if len(some) < 2:
            raise BadRecord("one sentence", example.place, "its order cannot be predicted: give longer texts")
        cut, exchanged = int(rng.integers(1, len(some))), bool(rng.random() < 0.5)
        order = [*range(cut, len(some)), *range(cut)] if exchanged else range(len(some))
        parts = list(at_weight(example.parts, 0.0))
        parts[at] = _joined(parts[at], some, order, spaces)
        return dataclasses.replace(example, parts=(*parts, Text(self.answers[exchanged], part.weight)))
