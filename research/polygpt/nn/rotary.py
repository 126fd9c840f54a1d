"""Rotary encodings: frequencies of channel pairs, and their scaling for longer contexts.

Axis letters: f pairs of channels, d channels of a head. `polygpt.nn.positions` builds the encodings from these.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from polygpt.spec import Spec


def frequencies(base: float, pairs: int) -> jax.Array:
    """Radians per position for each pair, float32 [f]: base^(-i/f). Su et al. (2104.09864), section 3.2.2."""
    return base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)


def apply_rope(x_BHTd: jax.Array, angle_BTf: jax.Array, factor: float = 1.0) -> jax.Array:
    """Rotates channels i and i + f by `angle_BTf[..., i]` and multiplies them by `factor`, for i < f.

    Channels from 2 f on are unchanged.
    """
    f = angle_BTf.shape[-1]
    sin, cos = jnp.sin(angle_BTf)[:, None], jnp.cos(angle_BTf)[:, None]
    if factor != 1:
        sin, cos = sin * factor, cos * factor
    first, second, rest = x_BHTd[..., :f], x_BHTd[..., f : 2 * f], x_BHTd[..., 2 * f :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHTd.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


@dataclasses.dataclass(frozen=True)
class Scaling(Spec):
    """Scaling of rotary frequencies, so that a model trained on short contexts reads longer ones."""

    factor: float = 4.0
    """s, the ratio of the extended context to the original one."""

    def validate(self):
        self.require(self.factor >= 1, "factor", "at least 1")

    def frequencies(self, base: float, pairs: int) -> jax.Array:
        """Replaces `frequencies(base, pairs)`."""
        raise NotImplementedError

    def temperature(self) -> float:
        """Factor on rotated queries and on rotated keys."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation: divides every position by the factor. Chen et al. (2306.15595), equation 4."""

    def frequencies(self, base: float, pairs: int) -> jax.Array:
        return frequencies(base, pairs) / self.factor


@dataclasses.dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware scaling: a larger base, which leaves the fastest pair unchanged and interpolates the slowest.

    Peng et al. (2309.00071), section 3.1.
    """

    def frequencies(self, base: float, pairs: int) -> jax.Array:
        return frequencies(base * self.factor ** (pairs / max(pairs - 1, 1)), pairs)


@dataclasses.dataclass(frozen=True)
class YaRN(Scaling):
    """Keeps fast pairs, interpolates slow ones, with a ramp between; sharpens attention. Peng et al. (2309.00071).

    Sections 3.2 and 3.4. The ramp is linear in the pair index, between integer bounds, as in the authors' code and
    released models; in the paper it is linear in the number of rotations.
    """

    original_length: int = 1024
    """L, the context length before scaling."""
    beta_fast: float = 32.0
    """Pairs that rotate more often than this within L are unchanged."""
    beta_slow: float = 1.0
    """Pairs that rotate less often than this within L are interpolated."""

    def validate(self):
        super().validate()
        self.require(self.original_length >= 1, "original_length", "at least 1")
        self.require(0 < self.beta_slow < self.beta_fast, "beta_slow", f"between 0 and beta_fast ({self.beta_fast})")

    def frequencies(self, base: float, pairs: int) -> jax.Array:
        def pair_index(rotations: float) -> float:
            return pairs * math.log(self.original_length / (rotations * 2 * math.pi)) / math.log(base)

        start = max(math.floor(pair_index(self.beta_fast)), 0)
        stop = min(math.ceil(pair_index(self.beta_slow)), 2 * pairs - 1)
        ramp = jnp.clip((jnp.arange(pairs, dtype=jnp.float32) - start) / max(stop - start, 0.001), 0, 1)
        return frequencies(base, pairs) * (1 - ramp + ramp / self.factor)

    def temperature(self) -> float:
        return 0.1 * math.log(self.factor) + 1
