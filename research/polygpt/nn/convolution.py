"""Convolution over time, for audio."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.nn.linear import Linear


class TimeConvolution(nnx.Module):
    """A convolution over time with an odd kernel and zero padding of half its size on either side.

    Computed as one matmul over the stacked neighbours of each frame: faster than a convolution call on CPU, equally
    fast elsewhere. The kernel has shape [size * inputs, outputs], neighbours outermost.
    """

    def __init__(self, inputs: int, outputs: int, *, size: int, stride: int, rngs: nnx.Rngs, dtype: str):
        self.size, self.stride = size, stride
        self.linear = Linear(size * inputs, outputs, rngs=rngs, bias=True, dtype=dtype, axes=(None, "width"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, frames, inputs] -> [B, ceil(frames / stride), outputs]."""
        batch, frames, inputs = x.shape
        half, stride, out = self.size // 2, self.stride, -(-frames // self.stride)
        groups = out + (self.size - 1) // stride
        # The TPU7x compiler rejects strided slices in time (libtpu 0.0.42, "TransformWindow: Loop will not make
        # progress"). Instead, split the frames into groups of `stride` and take the i-th frame of each group.
        padded = jnp.pad(x, ((0, 0), (half, half + stride), (0, 0)))[:, : groups * stride]
        grouped = padded.reshape(batch, groups, stride, inputs)
        neighbours = [grouped[:, i // stride : i // stride + out, i % stride] for i in range(self.size)]
        return self.linear(jnp.concatenate(neighbours, axis=-1))
