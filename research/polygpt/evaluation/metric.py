"""Metadata of evaluation results, and the base class of metrics for generated text."""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import ClassVar, Literal

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Measure:
    """Describes one value of an evaluation: the only metadata that reports, tables, `compare` and ablations use.

    Attributes:
        name: key in the results, "wer".
        better: which values are better; None if undeclared.
        label: heading, "WER"; default: the name with spaces.
        unit: "nats per token", or "" for none.
        share: whether it is between 0 and 1 and shown as a percentage.
        brief: whether to show it in compact views too: on the terminal and in charts.
        needs: "likelihood" if the model only scores the examples, "answers" if it must generate answers.
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
    """The values it returns, in table order. Undeclared values have no direction."""

    def __call__(self, predictions: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
        """Values by the names in `measures`, over all examples of a task; both lists have the same length, >= 1."""
        raise NotImplementedError


def normalize(text: str) -> str:
    """Text without case, punctuation and surplus space, in Unicode NFC form.

    Keeps symbols, digits, and letters with their diacritics.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if character in "-–—/" else character for character in text)
    text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
    return re.sub(r"\s+", " ", text).strip()
