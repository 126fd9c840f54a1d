"""The contract of transformations: random changes of an example before it is laid out.

A transformation makes an objective from plain data: it says which texts are read, which are predicted, and in which
order. It works on texts and not on tokens. So sources can be transformed for evaluation, where no tokenizer is known;
what it makes is an ordinary example, which can be shown, checked, packed and generated from; and a text is encoded in
one place. Where a paper counts tokens, a transformation counts units of text that a tokenizer never cuts: see `units`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from polygpt.data.example import Example, Medium, Text
from polygpt.errors import UserError
from polygpt.spec import Spec

Unit = Literal["character", "word"]
"""What is counted, moved or cut. A word includes the white space before it."""
_WORD = re.compile(r"\s*\S+|\s+\Z")


@dataclasses.dataclass(frozen=True)
class Transform(Spec):
    """A random change of an example. Subclasses live one per file, anywhere importable."""

    @property
    def special(self) -> tuple[str, ...]:
        """Names of the special tokens that it inserts; the experiment's tokenizer must have them."""
        return ()

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """A new example; all randomness comes from `rng`. Media are kept, in their order.

        Raises:
            BadRecord: if the example cannot be transformed.
        """
        raise NotImplementedError


def transformed(example: Example, transforms: Sequence[Transform], rng: np.random.Generator) -> Example:
    """The example after all transformations, in order.

    Raises:
        UserError: from a transformation, such as BadRecord.
        RuntimeError: any other error of a transformation, with the place of the example.
    """
    for transform in transforms:
        try:
            changed = transform(example, rng)
        except UserError:
            raise
        except Exception as error:
            what = f"{type(transform).__name__} raised {type(error).__name__}: {error}"
            remedy = "mend the transformation, or raise BadRecord in it for a record that cannot be used"
            raise RuntimeError(f"{example.place}: {what}: {remedy}") from error
        if not isinstance(changed, Example):
            what = f"{type(transform).__name__} returned {type(changed).__name__}"
            raise RuntimeError(f"{example.place}: {what}: it must return an Example")
        example = changed
    return example


def units(text: str, unit: Unit) -> list[str]:
    """The units of a text; joined, they are the text.

    A character is a token of `Bytes`, or several. A word with the white space before it is what byte-level BPE encodes
    by itself (GPT-2's pattern begins a new piece there), so its tokens do not depend on the text around it.
    """
    return list(text) if unit == "character" else _WORD.findall(text)


def scored(part: Text | Medium) -> bool:
    """Whether a part is a text that the model is scored on, and so may be transformed."""
    return isinstance(part, Text) and part.weight > 0 and not part.special


def token(name: str, weight: float = 0.0) -> Text:
    """A special token."""
    return Text(name, weight, special=True)


def at_weight(parts: Sequence[Text | Medium], weight: float) -> tuple[Text | Medium, ...]:
    """The parts, with the weights of texts multiplied by `weight`."""
    return tuple(
        dataclasses.replace(part, weight=part.weight * weight) if isinstance(part, Text) else part for part in parts
    )
