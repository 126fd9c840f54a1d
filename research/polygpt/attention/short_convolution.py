"""A short causal depthwise convolution, as used before recurrent layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.nn.linear import broadcast_to_rank


class ShortConvolution(nnx.Module):
    """y_t = sum_i w_i x_{t-i} over the last W positions of the same example. Dao and Gu (2405.21060, section 7).

    Positions before the example count as zeros. Padding is skipped, wherever it is. The kernel is [W, E], oldest
    position first.
    """

    def __init__(self, width: int, channels: int, *, rngs: nnx.Rngs, bias: bool):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width, channels)) * width**-0.5)
        self.bias = nnx.Param(jnp.zeros(channels)) if bias else None

    def empty(self, batch_size: int, dtype: str) -> tuple[jax.Array, jax.Array]:
        """The past before the first position: (the last W - 1 inputs [B, W-1, E], their segments, int32 [B, W-1])."""
        before, channels = self.kernel.shape[0] - 1, self.kernel.shape[1]
        return jnp.zeros((batch_size, before, channels), dtype), jnp.zeros((batch_size, before), jnp.int32)

    def __call__(
        self, x_BTE: jax.Array, segment_BT: jax.Array, past: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """([B, T, E] in the dtype of `x_BTE`, the past before the next position)."""
        B, T, _ = x_BTE.shape
        W = self.kernel.shape[0]
        real_BT = segment_BT > 0
        gaps = T > 1 and jnp.any(real_BT[:, 1:] & ~real_BT[:, :-1])
        x_BTE, segment_BT = _where(gaps, lambda x, s: _gathered((x, s), jnp.argsort(~real_BT)), x_BTE, segment_BT)
        x_BSE = jnp.concatenate([past[0].astype(x_BTE.dtype), x_BTE], axis=1)
        segment_BS = jnp.concatenate([past[1], segment_BT], axis=1)
        # Number the examples, so that two with the same segment are not confused.
        number_BS = jnp.cumsum(jnp.diff(segment_BS, axis=1, prepend=segment_BS[:, :1]) != 0, axis=1)
        y_BTE = jnp.zeros(x_BTE.shape, jnp.float32)
        for i, weight_E in enumerate(self.kernel[...]):
            same_BT = number_BS[:, i : i + T] == number_BS[:, W - 1 :]
            y_BTE += jnp.where(same_BT[..., None], x_BSE[:, i : i + T] * broadcast_to_rank(weight_E, 3), 0)
        if self.bias is not None:
            y_BTE += broadcast_to_rank(self.bias[...], 3)
        last_BW = real_BT.sum(axis=1)[:, None] + jnp.arange(W - 1)[None]
        past = _gathered((x_BSE, segment_BS), last_BW)
        rank_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1) - 1, 0)
        (y_BTE,) = _where(gaps, lambda y: _gathered((y,), rank_BT), y_BTE)
        return y_BTE.astype(x_BTE.dtype), past


def _where(gaps, change, *arrays):
    """`change(*arrays)` if there is padding between positions, which is rare; the gather is slow."""
    if gaps is False:
        return arrays
    return jax.lax.cond(gaps, change, lambda *arrays: arrays, *arrays)


def _gathered(arrays, index_BN):
    """The chosen positions of each row."""
    return tuple(jax.vmap(lambda x, index: x[index])(x, index_BN) for x in arrays)
