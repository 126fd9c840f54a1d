"""Linear maps: every projection of every model."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import sharding
from polygpt.nn.affine import affine
from polygpt.nn.low_rank import LowRankMatrix


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last axis.

    The leading axes are flattened first, see `as_rows`.

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
        flat = as_rows(x.astype(self.dtype))
        bias = None if self.bias is None else self.bias[...]
        if isinstance(kernel, LowRankMatrix):
            y = kernel.product(flat, self.dtype, output_dtype)
        elif sharding.active() is None and flat.dtype == kernel.dtype and output_dtype in (None, flat.dtype):
            y, bias = affine(flat, kernel, bias), None
        else:
            y = product(flat, kernel, self.dtype, output_dtype)
        if bias is not None:
            y = y + broadcast_to_rank(bias.astype(y.dtype), y.ndim)
        return y.reshape(*x.shape[:-1], kernel.shape[1])


def as_rows(x: jax.Array) -> jax.Array:
    """[..., D] -> [N, D], unless positions are split over devices: a merged axis could not be split that way.

    A two-dimensional matmul needs no transposing copy on any backend, and on CPUs XLA sums the gradients of biases and
    scales over one axis several times as fast as over two.
    """
    return x if sharding.is_split("positions") else x.reshape(-1, x.shape[-1])


def product(x: jax.Array, kernel: jax.Array, dtype: str, output_dtype: str | None = None) -> jax.Array:
    """x @ kernel, [..., inputs] -> [..., outputs], computed in `dtype`; x has it already, the kernel is float32.

    Devices sum their parts of the kernel's gradient in the dtype that its product has: `dtype`, or float32 if the
    layout says so (`MeshSpec.reduce_dtype`).
    """
    layout = sharding.active()
    if layout is None or layout.spec.reduce_dtype == "compute" or dtype == "float32":
        return jnp.matmul(x, kernel.astype(dtype), preferred_element_type=output_dtype)
    return _with_float32_gradient(x, kernel, dtype, output_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_float32_gradient(x, kernel, dtype, output_dtype):
    return jnp.matmul(x, kernel.astype(dtype), preferred_element_type=output_dtype)


def _forward(x, kernel, dtype, output_dtype):
    return _with_float32_gradient(x, kernel, dtype, output_dtype), (x, kernel)


def _backward(dtype, output_dtype, factors, dy):
    x, kernel = factors
    dy, leading = dy.astype(dtype), tuple(range(x.ndim - 1))
    of_kernel = jax.lax.dot_general(x, dy, ((leading, leading), ((), ())), preferred_element_type=jnp.float32)
    return jnp.matmul(dy, kernel.astype(dtype).T), of_kernel


_with_float32_gradient.defvjp(_forward, _backward)


def broadcast_to_rank(vector: jax.Array, rank: int) -> jax.Array:
    """[D] -> [1, ..., 1, D] with `rank` axes. Explicit, so that no wrong broadcast happens silently."""
    return vector.reshape((1,) * (rank - 1) + vector.shape)
