"""A linear map to the logits of classes or labels, or to the numbers of a regression."""

import dataclasses

import jax
from flax import nnx

from polygpt.heads.base import Head, HeadModule, pooled
from polygpt.nn.linear import Linear
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class LinearHead(Head):
    """A linear map with a bias."""

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str) -> HeadModule:
        return _LinearHead(self, width, rngs, dtype)


class _LinearHead(HeadModule):
    def __init__(self, spec: LinearHead, width: int, rngs: nnx.Rngs, dtype: str):
        self.pool = spec.pool
        self.map = Linear(width, spec.outputs, rngs=rngs, bias=True, dtype=dtype)

    def __call__(self, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
        return self.map(pooled(self.pool, hidden_BTD, batch), output_dtype="float32")
