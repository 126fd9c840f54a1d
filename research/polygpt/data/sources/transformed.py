"""A source whose examples are transformed, for evaluation."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from polygpt.data.example import Example
from polygpt.data.sources.base import Source, index_within
from polygpt.data.transforms.base import Transform, transformed


@dataclasses.dataclass(frozen=True)
class Transformed(Source):
    """The examples of another source, each transformed once and for all: held-out infills, for instance.

    For training use `Task.transform`, which draws again every epoch.
    """

    source: Source
    """The other source."""
    transform: tuple[Transform, ...]
    """The transformations, applied in order."""
    seed: int = 0
    """Random seed. The change of example `i` depends only on the seed and `i`."""

    def validate(self):
        self.require(self.seed >= 0, "seed", "at least 0")

    def open(self) -> Sequence[Example]:
        return TransformedExamples(self.source.open(), self.transform, self.seed)


class TransformedExamples(Sequence[Example]):
    """See `Transformed`."""

    def __init__(self, examples: Sequence[Example], transform: Sequence[Transform], seed: int):
        self.examples, self.transform, self.seed = examples, transform, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        i = index_within(index, len(self))
        return transformed(self.examples[i], self.transform, np.random.default_rng([self.seed, i]))

    def files(self) -> Sequence:
        """The media files in the folder of the other source, if it lists them."""
        return getattr(self.examples, "files", tuple)()
