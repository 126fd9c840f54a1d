"""Convolution over time, for audio."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.nn.linear import Linear


class TimeConvolution(nnx.Module):
    """A convolution over time with an odd kernel and zero padding of half its size on either side.

    It is one matmul over the stacked neighbours of each frame, which is faster on a CPU than a convolution call and the
    same elsewhere. The kernel has the shape [size * inputs, outputs], neighbours outermost.
    """

    def __init__(self, inputs: int, outputs: int, *, size: int, stride: int, rngs: nnx.Rngs, dtype: str):
        self.size, self.stride = size, stride
        self.linear = Linear(size * inputs, outputs, rngs=rngs, bias=True, dtype=dtype, axes=(None, "width"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, frames, inputs] -> [B, ceil(frames / stride), outputs]."""
        frames = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (self.size // 2, self.size // 2), (0, 0)))
        neighbours = [padded[:, i : i + frames : self.stride] for i in range(self.size)]
        return self.linear(jnp.concatenate(neighbours, axis=-1))
