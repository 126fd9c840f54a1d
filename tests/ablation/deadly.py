"""Text that kills the process which reads it, as often as it is told to."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from polygpt.data.example import Example
from polygpt.data.sources.text_files import TextFiles


@dataclasses.dataclass(frozen=True)
class Deadly(TextFiles):
    """Kills the first `times` processes that have read `after` examples; each leaves a file in `marks`."""

    marks: str = ""
    """A folder."""
    times: int = 1
    """How many processes."""
    after: int = 8
    """Examples that each may read."""

    def open(self) -> Sequence[Example]:
        return _Examples(super().open(), self)


class _Examples(Sequence):
    def __init__(self, examples: Sequence[Example], source: Deadly):
        self.examples, self.source, self.read = examples, source, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        self.read += 1
        marks = Path(self.source.marks)
        if self.read > self.source.after and len(list(marks.iterdir())) < self.source.times:
            (marks / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.examples[i]
