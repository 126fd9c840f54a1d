"""Word swap: pairs of words of a text change places."""

import dataclasses

import numpy as np

from polygpt.data.example import Text
from polygpt.data.transforms.text_noise import TextNoise, words


@dataclasses.dataclass(frozen=True)
class WordSwap(TextNoise):
    """Exchanges random pairs of words; white space stays in place. Wei and Zou, EDA (1901.11196), section 2."""

    rate: float = 0.1
    """Number of exchanges, as a fraction of the number of words (the paper's alpha), and at least one."""

    def validate(self):
        self.require(0 < self.rate <= 1, "rate", "in 0..1, above 0")

    def change(self, part: Text, rng: np.random.Generator) -> tuple[Text, ...]:
        pieces, places = words(part.text)
        for _ in range(max(1, round(self.rate * len(places))) if len(places) > 1 else 0):
            a, b = rng.choice(places, 2, replace=False)
            pieces[a], pieces[b] = pieces[b], pieces[a]
        return (dataclasses.replace(part, text="".join(pieces)),)
