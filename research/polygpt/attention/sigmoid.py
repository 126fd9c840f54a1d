"""Sigmoid attention: weights are independent, without competition between keys."""

import dataclasses
import math
from typing import ClassVar, Literal

from polygpt.attention.multi_head import MultiHead
from polygpt.attention.scores import Score


@dataclasses.dataclass(frozen=True)
class Shift(Score):
    """The score plus a constant, which affects a sigmoid but not a softmax."""

    adds: ClassVar[bool] = True

    by: float = 0.0
    """The constant."""

    def __call__(self, score, query, key, terms):
        return score + self.by


@dataclasses.dataclass(frozen=True)
class SigmoidAttention(MultiHead):
    """Each weight is a sigmoid of its own score. Ramapuram et al., Sigmoid Self-Attention (2409.04431), section 2.

    sigmoid(q k^T / sqrt(d) - log n) v. The bias -log n makes a query's weights sum to about one at the start of
    training, which the authors find essential (section 5); n is the sequence length.
    """

    paper = "2409.04431"

    normalizer: ClassVar[Literal["softmax", "sigmoid"]] = "sigmoid"

    length: int = 1024
    """n, the number of keys that a query sees in training: scores get the bias -log n."""

    def validate(self):
        super().validate()
        self.require(self.length >= 1, "length", "at least 1")

    def score(self, score: Score) -> Score:
        return super().score(score).then(Shift(-math.log(self.length)))

    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in super().backends() if name != "library")
