"""What an evaluation measures: the figures, what they mean, and the base class of metrics of generated text."""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import ClassVar, Literal

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Measure:
    """One figure of a held-out task, and how to read it. Reports, tables, `compare` and ablations ask nothing else.

    Attributes:
        name: its key in the results, "wer".
        better: which values are better; None if nobody has said so.
        label: its heading, "WER"; by default the name with spaces.
        unit: "nats per token", or "" for none.
        share: whether it lies between 0 and 1 and is shown as a percentage.
        brief: whether it is also shown where room is scarce, on the terminal and in charts.
        needs: "likelihood" if the model only reads the examples, "answers" if it must write them.
    """

    name: str
    better: Literal["lower", "higher"] | None
    label: str = ""
    unit: str = ""
    share: bool = False
    brief: bool = True
    needs: Literal["likelihood", "answers"] = "answers"

    @property
    def title(self) -> str:
        """The label, or the name if there is none."""
        return self.label or self.name.replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Metric(Spec):
    """Base class of metrics that compare generated texts with the truth. A new metric is a file with a subclass."""

    measures: ClassVar[tuple[Measure, ...]] = ()
    """What it returns, in the order of tables. A figure that is not declared here has no direction."""

    def __call__(self, predictions: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
        """Figures by the names of `measures`, over all examples of a task; both lists have the same length, >= 1."""
        raise NotImplementedError


def normalize(text: str) -> str:
    """Text without case, punctuation and surplus space, in Unicode's composed form.

    Symbols and digits stay, and so does every letter with its diacritics.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if character in "-–—/" else character for character in text)
    text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
    return re.sub(r"\s+", " ", text).strip()
