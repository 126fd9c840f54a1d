"""The data source contract."""

import dataclasses
import operator
from collections.abc import Sequence

from polygpt.data.example import Example
from polygpt.errors import UserError
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


def index_within(index: int, length: int) -> int:
    """An index into `length` examples as one of at least 0. Raises IndexError if there is none."""
    i = operator.index(index)
    if not -length <= i < length:
        raise IndexError(f"example {index} of {length}")
    return i % length


def example_at(examples: Sequence[Example], index: int) -> Example:
    """`examples[index]`.

    Raises:
        UserError: from the source, such as BadRecord.
        RuntimeError: any other error of the source, with the index.
    """
    try:
        return examples[index]
    except UserError:
        raise
    except Exception as error:
        remedy = "mend the source, or raise BadRecord in it for a record that cannot be used"
        what = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{type(examples).__name__}[{index}] raised {what}: {remedy}") from error
