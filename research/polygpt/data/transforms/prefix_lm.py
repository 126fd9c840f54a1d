"""Prefix language modelling: a random beginning is read, and the rest is predicted."""

import dataclasses

import numpy as np

from polygpt.data.example import Example
from polygpt.data.transforms.base import Transform, Unit, at_weight, scored, units


@dataclasses.dataclass(frozen=True)
class PrefixLM(Transform):
    """Takes the loss weights from a random beginning of the example. T5 (1910.10683), section 3.2.3.

    With `LayoutSpec.prompt_span` "bidirectional", the positions of that beginning see each other. Everything keeps its
    place.
    """

    share: tuple[float, float] = (0.0, 1.0)
    """Bounds of the prefix, as a fraction of the units of texts with a loss weight. At least one unit is predicted."""
    unit: Unit = "word"
    """Where a text may be cut: before any character, or before any word."""

    def validate(self):
        self.require(0 <= self.share[0] <= self.share[1] <= 1, "share", "rising, in 0..1")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        pieces = [units(part.text, self.unit) if scored(part) else [] for part in example.parts]
        count = sum(map(len, pieces))
        if not count:
            return example
        left = min(count - 1, int(rng.uniform(*self.share) * count))
        parts = []
        for part, some in zip(example.parts, pieces, strict=True):
            read, rest, left = some[:left], some[left:], max(0, left - len(some))
            if not read:
                parts += at_weight([part], 0.0 if left else 1.0)
                continue
            parts.append(dataclasses.replace(part, text="".join(read), weight=0.0))
            if rest:
                parts.append(dataclasses.replace(part, text="".join(rest)))
        return dataclasses.replace(example, parts=tuple(parts))
