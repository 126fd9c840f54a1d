"""A projection to unit vectors, which contrastive objectives compare."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.heads.base import Head, HeadModule, pooled
from polygpt.nn.linear import Linear
from polygpt.sequence import Batch


@dataclasses.dataclass(frozen=True)
class ProjectionHead(Head):
    """A linear map without bias, normalised to unit length, and a learned temperature: CLIP (2103.00020), section 2.3.

    Its scalars are `scale`, the inverse temperature, and `bias` if there is one: the similarities of a contrast are
    scale * (cosine) + bias.
    """

    temperature: float = 0.07
    """Initial temperature."""
    max_scale: float = 100.0
    """The largest scale, at which the temperature stops to fall (section 2.5)."""
    bias: float | None = None
    """Initial value of a learned bias, -10 in SigLIP (2303.15343), section 3.2; null for none."""

    def validate(self):
        super().validate()
        self.require(self.temperature > 0, "temperature", "above 0")
        self.require(self.max_scale * self.temperature >= 1, "max_scale", "at least 1 / temperature")

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str) -> HeadModule:
        return _ProjectionHead(self, width, rngs, dtype)


class _ProjectionHead(HeadModule):
    def __init__(self, spec: ProjectionHead, width: int, rngs: nnx.Rngs, dtype: str):
        self.pool, self.max_scale = spec.pool, spec.max_scale
        self.map = Linear(width, spec.outputs, rngs=rngs, bias=False, dtype=dtype)
        self.log_scale = nnx.Param(jnp.float32(-math.log(spec.temperature)), axes=())
        self.bias = None if spec.bias is None else nnx.Param(jnp.float32(spec.bias), axes=())

    def __call__(self, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
        x_BTK = self.map(pooled(self.pool, hidden_BTD, batch), output_dtype="float32")
        square_BT1 = jnp.sum(x_BTK**2, axis=-1, keepdims=True)
        return x_BTK * jax.lax.rsqrt(jnp.maximum(square_BT1, 1e-12))

    def scalars(self) -> dict[str, jax.Array]:
        scale = jnp.exp(_capped(self.log_scale[...], math.log(self.max_scale)))
        return {"scale": scale} | ({} if self.bias is None else {"bias": self.bias[...]})


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _capped(x: jax.Array, most: float) -> jax.Array:
    """At most `most`. Above it only a gradient whose descent lowers x passes, so that it can come back."""
    return jnp.minimum(x, most)


def _capped_forward(x, most):
    return jnp.minimum(x, most), x


def _capped_backward(most, x, gradient):
    return (jnp.where((x <= most) | (gradient > 0), gradient, 0),)


_capped.defvjp(_capped_forward, _capped_backward)
