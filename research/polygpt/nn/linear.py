"""Linear maps: every projection of every model."""

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import sharding
from polygpt.nn.low_rank import LowRankMatrix


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last axis.

    The leading axes are flattened first, because a two-dimensional matmul needs no transposing copy on any backend.
    They are not flattened when positions are split over devices: a merged axis could not be split that way.

    Args:
        inputs, outputs: widths.
        rngs: source of the initial kernel, normal with standard deviation `scale / sqrt(inputs)`.
        bias: whether to add a bias; it is initialised to zero.
        dtype: compute dtype; parameters are float32.
        scale: factor on the initial kernel.
        axes: logical names of the two kernel axes, which decide how it is split over devices (`sharding.py`).
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
        self.kernel = nnx.Param(kernel, axes=axes, updatable=True)
        # Model-width biases are replicated.
        self.bias = nnx.Param(jnp.zeros(outputs), axes=(None if axes[1] == "width" else axes[1],)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array, output_dtype: str | None = None) -> jax.Array:
        """[..., inputs] -> [..., outputs], computed in `dtype`; `output_dtype="float32"` returns the unrounded sums."""
        kernel = self.kernel.get_value()
        flat = x.astype(self.dtype)
        if not sharding.is_split("positions"):
            flat = flat.reshape(-1, kernel.shape[0])
        if isinstance(kernel, LowRankMatrix):
            y = kernel.product(flat, self.dtype, output_dtype)
        else:
            y = jnp.matmul(flat, kernel.astype(self.dtype), preferred_element_type=output_dtype)
        y = y.reshape(*x.shape[:-1], kernel.shape[1])
        return y if self.bias is None else y + broadcast_to_rank(self.bias[...].astype(y.dtype), y.ndim)


def broadcast_to_rank(vector: jax.Array, rank: int) -> jax.Array:
    """[D] -> [1, ..., 1, D] with `rank` axes. Explicit, so that no wrong broadcast happens silently."""
    return vector.reshape((1,) * (rank - 1) + vector.shape)
