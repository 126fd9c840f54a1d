"""Augmentations of text: what they have in common."""

import dataclasses
import re
from typing import Literal

import numpy as np

from polygpt.data.example import Example, Text
from polygpt.data.transforms.base import Transform, scored


@dataclasses.dataclass(frozen=True)
class TextNoise(Transform):
    """A random change of single texts; special tokens and media stay as they are."""

    texts: Literal["prompts", "answers", "all"] = "prompts"
    """The texts to change: those that are only read, those with a loss weight, or both."""

    def change(self, part: Text, rng: np.random.Generator) -> tuple[Text, ...]:
        """What replaces a text."""
        raise NotImplementedError

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        parts = []
        for part in example.parts:
            changed = isinstance(part, Text) and not part.special and self.texts in ("all", _KINDS[scored(part)])
            parts += self.change(part, rng) if changed else (part,)
        return dataclasses.replace(example, parts=tuple(parts))


def words(text: str) -> tuple[list[str], list[int]]:
    """(words and the white space between them, indices of the words)."""
    pieces = re.split(r"(\s+)", text)
    return pieces, [i for i in range(0, len(pieces), 2) if pieces[i]]


_KINDS = {False: "prompts", True: "answers"}
