"""A matrix with a low-rank update, which a linear map applies without ever forming the sum."""

import dataclasses

import jax
import jax.numpy as jnp

_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankMatrix:
    """W + scale * down @ up, in the place of a matrix [..., inputs, outputs]; with a magnitude, rescaled columns.

    A leading axis of layers is scanned like that of an array: each leaf has it. `[...]` gives the sum as an array, for
    modules that do more than multiply with it.

    Attributes:
        matrix: W, float32 [..., inputs, outputs].
        down: float32 [..., inputs, rank].
        up: float32 [..., rank, outputs].
        magnitude: float32 [..., outputs]; a column has the length that it has in W, times 1 + magnitude: DoRA
            (2402.09353, equation 5). None leaves the lengths of the sum.
        scale: factor on the update.
    """

    matrix: jax.Array
    down: jax.Array
    up: jax.Array
    magnitude: jax.Array | None
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., inputs, outputs]."""
        return self.matrix.shape

    def __getitem__(self, index) -> jax.Array:
        return self.merged()[index]

    def merged(self) -> jax.Array:
        """The sum as an array, accumulated in float32."""
        changed = self.matrix + self.scale * jnp.matmul(self.down, self.up, precision=_EXACT)
        if self.magnitude is None:
            return changed
        ratio = _length(_square(self.matrix)) / _length(_square(changed))
        return changed * (ratio * (1 + self.magnitude))[..., None, :]

    def product(self, x: jax.Array, dtype: str, output_dtype: str | None = None) -> jax.Array:
        """x @ the sum, [..., inputs] -> [..., outputs], computed in `dtype` for a single matrix.

        x @ W + (x @ down) @ (scale * up): LoRA (2106.09685), equation 3. Neither the sum nor its gradient takes memory.
        """
        up = (self.scale * self.up).astype(dtype)
        y = jnp.matmul(x, self.matrix.astype(dtype), preferred_element_type=output_dtype)
        y = y + jnp.matmul(x @ self.down.astype(dtype), up, preferred_element_type=output_dtype)
        if self.magnitude is None:
            return y
        ratio = _length(_square(self.matrix)) / _length(self._changed_square())
        return y * (ratio * (1 + self.magnitude)).astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def _changed_square(self) -> jax.Array:
        """The squared length of each column of W + scale * down @ up, [outputs], by the binomial formula."""
        up = self.scale * self.up
        mixed = jnp.sum(jnp.matmul(self.down.T, self.matrix, precision=_EXACT) * up, axis=0)
        gram = jnp.matmul(self.down.T, self.down, precision=_EXACT)
        square = _square(self.matrix) + 2 * mixed + jnp.sum(jnp.matmul(gram, up, precision=_EXACT) * up, axis=0)
        return jnp.maximum(square, 0)  # rounding


def _square(matrix: jax.Array) -> jax.Array:
    """The squared length of each column, [..., outputs]."""
    return jnp.sum(jnp.square(matrix), axis=-2)


def _length(square: jax.Array) -> jax.Array:
    """The square root; tiny rather than 0, where it would have no gradient."""
    return jnp.sqrt(square + 1e-30)
