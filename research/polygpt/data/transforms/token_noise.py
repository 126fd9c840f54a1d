"""Token noise: some units of a text become others."""

import dataclasses
import itertools

import numpy as np

from polygpt.data.example import Text
from polygpt.data.transforms.base import Unit
from polygpt.data.transforms.text_noise import TextNoise, words


@dataclasses.dataclass(frozen=True)
class TokenNoise(TextNoise):
    """Replaces units by others of the same text: noise of its unigram frequencies. White space between words stays.

    Xie et al., "Data Noising as Smoothing in Neural Network Language Models" (1703.02573), section 3. A replaced unit
    has no loss weight: the model reads it and does not learn to write it.
    """

    rate: float = 0.1
    """Probability that a unit is replaced."""
    unit: Unit = "word"
    """What is replaced."""

    def validate(self):
        self.require(0 <= self.rate <= 1, "rate", "in 0..1")

    def change(self, part: Text, rng: np.random.Generator) -> tuple[Text, ...]:
        pieces, places = words(part.text) if self.unit == "word" else (list(part.text), range(len(part.text)))
        if not places:
            return (part,)
        new = [(piece, part.weight) for piece in pieces]
        for place, drawn in zip(places, rng.integers(len(places), size=len(places)), strict=True):
            if rng.random() < self.rate:
                new[place] = pieces[places[drawn]], 0.0
        groups = itertools.groupby(new, key=lambda pair: pair[1])
        return tuple(
            dataclasses.replace(part, text="".join(text for text, _ in group), weight=weight)
            for weight, group in groups
        )
