"""The contract of a data source."""

import dataclasses
from collections.abc import Sequence

from polygpt.data.example import Example
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Source(Spec):
    """Where examples come from. Subclasses live one a file, anywhere importable."""

    def open(self) -> Sequence[Example]:
        """The examples, by random access: `len(examples)` and `examples[i]`, the same example for the same `i` always.

        The sequence may be pickled into worker processes and read from several threads. It opens files on first use.

        Raises:
            UserError: if there is no such data. `examples[i]` raises BadRecord for a record that cannot be used.
        """
        raise NotImplementedError
