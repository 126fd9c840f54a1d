"""Position encodings: what tells a model where a token stands.

An encoding may act in three places: `build` gives a module whose output is added to the embeddings, `rotate` turns
queries and keys inside attention, `score` modifies their products. One that does not act in a place leaves it alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Position(Spec):
    """A position encoding. A new one derives from this class and overrides one of the three places."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """A module `position_BT -> [B, T, D]`, added to the embeddings; None adds nothing."""
        return None

    def rotate(
        self, x_BHTd: jax.Array, position_BT: jax.Array, coordinate_BT3: jax.Array | None = None
    ) -> jax.Array:
        """Queries or keys as attention is to see them.

        Args:
            x_BHTd: queries or keys.
            position_BT: int32, the place in its own example.
            coordinate_BT3: int32 (time, row, column); None means the position in all three.
        """
        return x_BHTd

    def score(self) -> Any:
        """What it does to attention scores, a `polygpt.attention.scores.Score`; None leaves them alone."""
        return None

    def limit(self) -> int | None:
        """The number of distinct positions that the encoding knows; None is without bound."""
        return None


@dataclasses.dataclass(frozen=True)
class NoPosition(Position):
    """No encoding: a causal decoder finds positions by itself. Haviv et al. (2203.16634)."""


@dataclasses.dataclass(frozen=True)
class Learned(Position):
    """A learned vector a position. Gehring et al. (1705.03122), section 3.1."""

    length: int = 1024
    """Number of positions; a longer sequence is an error where rows are made."""

    def validate(self):
        self.require(self.length >= 1, "length", "at least 1")

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return _Learned(self.length, width, rngs)

    def limit(self) -> int | None:
        return self.length


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Position):
    """Sines, then cosines, of geometrically spaced frequencies. Vaswani et al. (1706.03762), section 3.5.

    Laid out and spaced as in the authors' own code, tensor2tensor, and Whisper: the longest wavelength is 2 pi `base`.
    """

    base: float = 10000.0
    """The ratio of the longest to the shortest wavelength."""

    def validate(self):
        self.require(self.base > 1, "base", "above 1")

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        self.require(width % 2 == 0 and width >= 4, "base", f"used with an even width of at least 4, not {width}")
        return _Sinusoidal(self.base, width)


@dataclasses.dataclass(frozen=True)
class Rope(Position):
    """Rotary encoding: pairs of channels turn by an angle that grows with the position. Su et al. (2104.09864), eq. 34.

    A pair is channel i and i + d/2, as in GPT-NeoX and Llama.
    """

    base: float = 10000.0
    """The base of the geometric series of frequencies."""

    def validate(self):
        self.require(self.base > 1, "base", "above 1")

    def rotate(
        self, x_BHTd: jax.Array, position_BT: jax.Array, coordinate_BT3: jax.Array | None = None
    ) -> jax.Array:
        width = x_BHTd.shape[-1]
        self.require(width % 2 == 0, "base", f"used with heads of an even width, not {width}")
        half = width // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = position_BT[:, None, :, None].astype(jnp.float32) * frequency[None, None, None, :]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        first, second = x_BHTd[..., :half], x_BHTd[..., half:]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHTd.dtype)


class _Learned(nnx.Module):
    def __init__(self, length: int, width: int, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (length, width)) * 0.02)

    def __call__(self, position_BT: jax.Array) -> jax.Array:
        return jnp.take(self.table[...], position_BT, axis=0, mode="clip")


class _Sinusoidal(nnx.Module):
    def __init__(self, base: float, width: int):
        self.base, self.width = base, width

    def __call__(self, position_BT: jax.Array) -> jax.Array:
        half = self.width // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / (half - 1))
        angle = position_BT[..., None].astype(jnp.float32) * frequency[None, None, :]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
