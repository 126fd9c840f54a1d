"""Softmax attention that forgets: every position between key and query fades what the query sees of the key."""

import dataclasses

from polygpt.attention.multi_head import MultiHead
from polygpt.attention.scores import ForgetGate
from polygpt.nn.positions import NoPosition, Position


@dataclasses.dataclass(frozen=True)
class Forgetting(MultiHead):
    """softmax(q k^T + D) v, D_ij = log f_{j+1} + ... + log f_i, f = sigmoid(x w + b) for each head.

    Lin et al., Forgetting Transformer (2503.02130), section 3: FoX. D is the difference of two running sums, a number
    for each query and each key, so every backend computes it and the cache holds one number more for each head and
    position. Positions are in D: no encoding acts here, as in the paper. `qk_norm` is part of the paper's "Pro" block,
    whose output norm, output gate and key shift are not here.
    """

    paper = "2503.02130"

    position: Position | None = NoPosition()
    """A position encoding beside the forget gates; null means that of the stack."""

    def score(self, score):
        return super().score(score).then(ForgetGate())
