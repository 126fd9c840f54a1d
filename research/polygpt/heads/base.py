"""The head contract: from the decoder's output to numbers that objectives compare with labels or with each other."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.sequence import Batch
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Head(Spec):
    """A head of the model. A new one derives from this class and is listed in the model's `heads`."""

    outputs: int
    """K, numbers per position: the classes of a label, or the numbers of one."""
    pool: Literal["last", "mean", "first"] = "last"
    """What a position reads. last: its own hidden vector; labels of a whole example are at its last position. mean: the
    mean over all positions of its example. first: the first position of its example, for bidirectional attention."""

    def validate(self):
        self.require(self.outputs >= 1, "outputs", "at least 1")

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str) -> "HeadModule":
        """The module of the head of a decoder of `width`."""
        raise NotImplementedError(f"{type(self).__name__} defines no build")


class HeadModule(nnx.Module):
    """A module `(hidden_BTD, batch) -> float32 [B, T, K]`, which is finite at padding too."""

    def scalars(self) -> dict[str, jax.Array]:
        """Learned numbers that objectives use beside the outputs, float32 by name, such as a temperature."""
        return {}


def pooled(pool: str, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
    """What each position reads, see `Head.pool`: [B, T, D], float32 unless `pool` is "last"; 0 at padding."""
    if pool == "last":
        return hidden_BTD
    real_BT = batch.segment_BT > 0
    read_BTS = (batch.segment_BT[:, :, None] == batch.segment_BT[:, None]) & real_BT[:, None]
    if pool == "first":
        read_BTS &= (batch.position_BT == 0)[:, None]
    share_BTS = read_BTS / jnp.maximum(read_BTS.sum(axis=-1, keepdims=True), 1)
    real_BTD = jnp.where(real_BT[..., None], hidden_BTD, 0).astype(jnp.float32)
    return jnp.einsum("bts,bsd->btd", share_BTS, real_BTD, precision=jax.lax.Precision.HIGHEST)
