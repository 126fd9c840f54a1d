"""Deletion: some units of a text are left out."""

import dataclasses

import numpy as np

from polygpt.data.example import Text
from polygpt.data.transforms.base import Unit, units
from polygpt.data.transforms.text_noise import TextNoise


@dataclasses.dataclass(frozen=True)
class Deletion(TextNoise):
    """Leaves out units at random, but never all: Wei and Zou, EDA (1901.11196), section 2, "random deletion"."""

    rate: float = 0.1
    """Probability that a unit is left out."""
    unit: Unit = "word"
    """What is left out."""

    def validate(self):
        self.require(0 <= self.rate <= 1, "rate", "in 0..1")

    def change(self, part: Text, rng: np.random.Generator) -> tuple[Text, ...]:
        some = units(part.text, self.unit)
        if not some:
            return (part,)
        kept = rng.random(len(some)) >= self.rate
        kept[rng.integers(len(some))] |= not kept.any()
        return (dataclasses.replace(part, text="".join(some[i] for i in np.flatnonzero(kept))),)
