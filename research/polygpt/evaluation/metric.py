"""What a metric of generated text is."""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Metric(Spec):
    """Base of the metrics that compare generated texts with the truth. A new one is a file with a subclass."""

    def __call__(self, predictions: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
        """Figures by name, over all examples of a task at once; both lists have the same length of at least 1."""
        raise NotImplementedError


def normalize(text: str) -> str:
    """Without case, punctuation and surplus space, in Unicode's composed form: what a listener would count as the same.

    Symbols and digits stay; so does every letter with its marks.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if character in "-–—/" else character for character in text)
    text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
    return re.sub(r"\s+", " ", text).strip()
