"""Next-sentence prediction: does one text follow another? The second is of the same example, or of another one."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from polygpt.data.example import Example
from polygpt.data.sources.base import Source, index_within
from polygpt.data.transforms.base import scored
from polygpt.data.transforms.sentences import sentences
from polygpt.errors import BadRecord, UserError

TRIES = 20
"""Number of other examples drawn to find a sentence that does not follow."""


@dataclasses.dataclass(frozen=True)
class NextSentence(Source):
    """Pairs of sentences of another source. Devlin et al., BERT (1810.04805), section 3.1, task 2.

    A pair begins with a sentence of the first text with a loss weight. Half of the time the sentence after it follows,
    and the label is 1; else one of another example of the source, which is not the first sentence there, and the label
    is 0. The pair takes the place of the text, with its loss weight, so that `MaskedLM` can read it too. The split is
    that of the source: no training pair has a held-out sentence.

    A sentence ends with `.`, `!` or `?`, or with its line.
    """

    source: Source
    """The other source. Its examples should be passages or documents, of at least two sentences each."""
    sentences: int = 1
    """Largest number of successive sentences on either side of a pair."""
    label: str = "follows"
    """Name of the label; `data.layout.labels` declares it with two classes."""
    separator: str = " "
    """What stands between the two."""
    pairs: int = 1
    """Number of pairs of each example in an epoch, each drawn by itself; BERT's code makes 10 ("dupe_factor")."""
    seed: int = 0
    """Random seed. Pair `i` depends only on the seed and `i`."""

    def validate(self):
        self.require(self.sentences >= 1, "sentences", "at least 1")
        self.require(self.pairs >= 1, "pairs", "at least 1")
        self.require(self.seed >= 0, "seed", "at least 0")

    def open(self) -> "SentencePairs":
        """The pairs. Raises UserError if the source has fewer than two examples, or from the source."""
        examples = self.source.open()
        if len(examples) < 2:
            raise UserError(
                f"NextSentence: its source {type(self.source).__name__} has {len(examples)} of the 2 examples that it "
                "needs at least, because sentences that do not follow come from other examples: add examples, or cut "
                "the text into smaller ones"
            )
        return SentencePairs(self, examples)


class SentencePairs(Sequence[Example]):
    """See `NextSentence`. Pairs `i`, `i + n`, ... are of example `i` of the source's n."""

    def __init__(self, spec: NextSentence, examples: Sequence[Example]):
        self.spec, self.examples = spec, examples

    def __len__(self) -> int:
        return self.spec.pairs * len(self.examples)

    def __getitem__(self, index: int) -> Example:
        pair = index_within(index, len(self))
        i, rng = pair % len(self.examples), np.random.default_rng([self.spec.seed, pair])
        example, follows = self.examples[i], bool(rng.random() < 0.5)
        at, first, second = self._cut(example, rng)
        if not follows:
            second = self._elsewhere(i, second, rng)
        parts = list(example.parts)
        parts[at] = dataclasses.replace(parts[at], text=f"{first}{self.spec.separator}{second}")
        labels = {**example.labels, self.spec.label: int(follows)}
        return dataclasses.replace(example, parts=tuple(parts), labels=labels)

    def files(self) -> Sequence:
        """The media files in the folder of the source, if it lists them."""
        return getattr(self.examples, "files", tuple)()

    def _cut(self, example: Example, rng: np.random.Generator) -> tuple[int, str, str]:
        """(index of the text, sentences before a random cut, sentences after it). Raises BadRecord if there is none."""
        at = next((i for i, part in enumerate(example.parts) if scored(part)), None)
        lines = () if at is None else example.parts[at].text.splitlines()
        some = [sentence for line in lines for sentence in sentences(line)[0] if sentence.strip()]
        if len(some) < 2:
            raise BadRecord("fewer than two sentences", example.place, "no pair can be made of it: give longer texts")
        cut, most = int(rng.integers(1, len(some))), self.spec.sentences
        return at, *(" ".join(chosen) for chosen in (some[max(0, cut - most) : cut], some[cut : cut + most]))

    def _elsewhere(self, i: int, following: str, rng: np.random.Generator) -> str:
        """What follows a random cut in another example than `i`, and differs from what follows here."""
        for _ in range(TRIES):
            other = (i + int(rng.integers(1, len(self.examples)))) % len(self.examples)
            try:
                found = self._cut(self.examples[other], rng)[2]
            except BadRecord:
                continue
            if found != following:
                return found
        remedy = f"{TRIES} others have fewer than two sentences, or the same: give longer or more different texts"
        raise BadRecord("no other sentence", self.examples[i].place, remedy)
