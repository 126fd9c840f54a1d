"""Normalisations over the width. All compute in float32 and return the dtype of their input."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt import sharding
from polygpt.nn.linear import as_rows, broadcast_to_rank
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Norm(Spec):
    """A normalisation. A new one derives from this class and builds a module `[..., D] -> [..., D]`."""

    def build(self, width: int) -> nnx.Module:
        """The module for vectors of `width`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """x / rms(x) * scale. Zhang and Sennrich, Root Mean Square Layer Normalization (1910.07467), eq. 4."""

    epsilon: float = 1e-6
    """Added to the mean square."""

    def build(self, width: int) -> nnx.Module:
        return _RMSNorm(self, width)


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean(x)) / std(x) * scale + bias. Ba et al., Layer Normalization (1607.06450), section 3."""

    epsilon: float = 1e-5
    """Added to the variance."""

    def build(self, width: int) -> nnx.Module:
        return _LayerNorm(self, width)


class _RMSNorm(nnx.Module):
    def __init__(self, spec: RMSNorm, width: int):
        self.epsilon = spec.epsilon
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = _rows(x).astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(mean_square + self.epsilon) * broadcast_to_rank(self.scale[...], wide.ndim)
        return y.astype(x.dtype).reshape(x.shape)


class _LayerNorm(nnx.Module):
    def __init__(self, spec: LayerNorm, width: int):
        self.epsilon = spec.epsilon
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = _rows(x).astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        y = y * broadcast_to_rank(self.scale[...], y.ndim) + broadcast_to_rank(self.bias[...], y.ndim)
        return y.astype(x.dtype).reshape(x.shape)


def _rows(x: jax.Array) -> jax.Array:
    """`as_rows` of [B, T, D] on one device. Several, which may split heads [B, H, T, d] too, gain nothing from it."""
    return as_rows(x) if x.ndim == 3 and sharding.active() is None else x
