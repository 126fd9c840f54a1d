"""The data source contract."""

import dataclasses
from collections.abc import Sequence

from polygpt.data.example import Example
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Source(Spec):
    """The specification of a data source. Subclasses live one per file, anywhere importable."""

    def open(self) -> Sequence[Example]:
        """The examples, by random access: `len(examples)` and `examples[i]`. An index always gives the same example.

        The sequence is pickled to worker processes and read from several threads; it should open files on first use.
        It may have a method `files()` that lists the source's media files; `polygpt data check` uses it to find files
        that no example names.

        Raises:
            UserError: if the data cannot be found. `examples[i]` raises BadRecord for an unusable record.
        """
        raise NotImplementedError
