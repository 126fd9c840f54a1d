"""Linear maps: every projection of every model."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import sharding


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last axis.

    The leading axes are flattened first: one two-dimensional matmul needs no transposing copy on any backend. Positions
    that are split over devices stay an axis of their own: flattened with the rows they could not be.

    Args:
        inputs, outputs: widths.
        rngs: gives the initial kernel, normal with standard deviation `scale / sqrt(inputs)`.
        bias: whether there is a bias; it starts at zero.
        dtype: the dtype to compute in; parameters are float32.
        scale: of the initial kernel.
        axes: the names of the two axes of the kernel, by which it is split over devices (`sharding.py`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        bias: bool,
        dtype: str,
        scale: float = 1.0,
        axes: tuple[str | None, str | None] = ("width", None),
    ):
        kernel = jax.random.normal(rngs.params(), (inputs, outputs)) * (scale * inputs**-0.5)
        self.kernel = nnx.Param(kernel, axes=axes)
        # A vector as long as the model is wide is not worth splitting.
        self.bias = nnx.Param(jnp.zeros(outputs), axes=(None if axes[1] == "width" else axes[1],)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array, output_dtype: str | None = None) -> jax.Array:
        """[..., inputs] -> [..., outputs], computed in `dtype`; `output_dtype="float32"` keeps the sums unrounded."""
        kernel = self.kernel[...].astype(self.dtype)
        flat = x.astype(self.dtype)
        if not sharding.splits("positions"):
            flat = flat.reshape(-1, kernel.shape[0])
        y = jnp.matmul(flat, kernel, preferred_element_type=output_dtype).reshape(*x.shape[:-1], kernel.shape[1])
        return y if self.bias is None else y + broadcast_to_rank(self.bias[...].astype(y.dtype), y.ndim)


def broadcast_to_rank(vector: jax.Array, rank: int) -> jax.Array:
    """[D] -> [1, ..., 1, D] of `rank` axes: the broadcast is written out, so that no wrong one happens silently."""
    return vector.reshape((1,) * (rank - 1) + vector.shape)
