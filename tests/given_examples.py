"""A source of examples that a test has made."""

import dataclasses
from typing import Any

from polygpt.data.sources.base import Source
from polygpt.errors import BadRecord


@dataclasses.dataclass(frozen=True)
class Given(Source):
    """Examples as they are given; one that is an error is raised."""

    examples: tuple[Any, ...]

    def open(self):
        return _Given(self.examples)


class _Given(list):
    def __getitem__(self, i):
        example = super().__getitem__(i)
        if isinstance(example, BadRecord):
            raise example
        return example
