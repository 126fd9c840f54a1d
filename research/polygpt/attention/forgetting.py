"""Forgetting attention: softmax attention with data-dependent decay between key and query."""

import dataclasses

from polygpt.attention.multi_head import MultiHead
from polygpt.attention.scores import ForgetGate
from polygpt.nn.positions import NoPosition, Position


@dataclasses.dataclass(frozen=True)
class Forgetting(MultiHead):
    """softmax(q k^T + D) v, D_ij = log f_{j+1} + ... + log f_i, f = sigmoid(x w + b) for each head.

    Lin et al., Forgetting Transformer (2503.02130), section 3: FoX. D is the difference of two running sums, one value
    per query and per key, so every backend can compute it, and the cache needs one more value per head and position. D
    encodes positions, so there is no other encoding by default, as in the paper. Of the paper's "Pro" block only
    `qk_norm` is available, not the output norm, output gate and key shift.
    """

    paper = "2503.02130"
    mask_is_bound = True  # gates that forget much leave distant keys a weight of exactly 0

    position: Position | None = NoPosition()
    """A position encoding in addition to the forget gates; null for that of the stack."""

    def score(self, score):
        return super().score(score).then(ForgetGate())
