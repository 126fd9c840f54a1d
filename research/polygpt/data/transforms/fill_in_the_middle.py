"""Fill in the middle: a model that reads left to right learns to write what lies between two texts."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from polygpt.data.example import Example, Medium, Text
from polygpt.data.transforms.base import Transform, Unit, at_weight, scored, token, units

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
Parts = Sequence[Text | Medium]


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle(Transform):
    """Moves a random middle of the example to its end. Bavarian et al. (2207.14255), section 3 and appendix D.

    | order | row |
    |---|---|
    | PSM | `bos <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle eos` |
    | SPM, the paper's variant 2 | `bos <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle eos` |

    The middle lies within one text with a loss weight, drawn by length; media and other texts before it belong to the
    prefix, those after it to the suffix. As in the paper, prefix, middle and suffix keep their loss weights, and a cut
    is between any two characters by default. The three special tokens have none: they are given, never generated.

    An example is never cut to the length of a row, and never joined with the others of its row. So the source decides
    between the paper's two levels: whole documents give document level, pieces that fill a row context level. If all
    examples have one length, positions tell how long a middle is, and the model need not read the suffix to end it.
    """

    rate: float = 0.5
    """Probability that an example is transformed; the others stay left to right."""
    spm: float = 0.5
    """Probability that a transformed example is in the order suffix, prefix, middle."""
    unit: Unit = "character"
    """Where a text may be cut: before any character, or before any word."""
    middle: tuple[int, int] | None = None
    """Least and greatest length of the middle in units, drawn uniformly; null for the paper's two uniform cuts, between
    which it may be empty."""
    context_weight: float = 1.0
    """Multiplies the loss weights of prefix and suffix; 0 makes them the prompt for a generated middle."""

    def validate(self):
        self.require(0 <= self.rate <= 1, "rate", "in 0..1")
        self.require(0 <= self.spm <= 1, "spm", "in 0..1")
        middle = self.middle or (1, 1)
        self.require(1 <= middle[0] <= middle[1], "middle", "null, or rising and at least 1")
        self.require(self.context_weight >= 0, "context_weight", "0 or above")

    @property
    def special(self) -> tuple[str, ...]:
        return PREFIX, SUFFIX, MIDDLE

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        parts = example.parts
        pieces = [units(part.text, self.unit) if scored(part) else [] for part in parts]
        ends = np.cumsum([len(some) for some in pieces])
        if rng.random() >= self.rate or not parts or not ends[-1]:
            return example
        at = int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))
        start, stop = self._cuts(len(pieces[at]), rng)
        cut = (pieces[at][:start], pieces[at][start:stop], pieces[at][stop:])
        before, middle, after = (dataclasses.replace(parts[at], text="".join(some)) for some in cut)
        prefix = at_weight([*parts[:at], before], self.context_weight)
        suffix = at_weight([after, *parts[at + 1 :]], self.context_weight)
        order = _spm if rng.random() < self.spm else _psm
        return dataclasses.replace(example, parts=(*order(prefix, suffix), middle))

    def prompt(self, prefix: Parts, suffix: Parts) -> tuple[Text | Medium, ...]:
        """The prompt whose continuation is what lies between a prefix and a suffix; in PSM order if it was trained."""
        return (_psm if self.spm < 1 else _spm)(tuple(prefix), tuple(suffix))

    def _cuts(self, count: int, rng: np.random.Generator) -> tuple[int, int]:
        if self.middle is None:
            start, stop = sorted(int(cut) for cut in rng.integers(count + 1, size=2))
            return start, stop
        shortest, longest = (min(bound, count) for bound in self.middle)
        length = int(rng.integers(shortest, longest + 1))
        start = int(rng.integers(count - length + 1))
        return start, start + length


def _psm(prefix: Parts, suffix: Parts) -> tuple[Text | Medium, ...]:
    return (token(PREFIX), *prefix, token(SUFFIX), *suffix, token(MIDDLE))


def _spm(prefix: Parts, suffix: Parts) -> tuple[Text | Medium, ...]:
    return (token(PREFIX), token(SUFFIX), *suffix, token(MIDDLE), *prefix)
