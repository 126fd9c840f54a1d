"""Position encodings.

An encoding can act in three places: `build` returns a module whose output is added to the embeddings, `rotate` rotates
queries and keys inside attention, and `score` modifies attention scores. The defaults do nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polygpt.errors import SpecError
from polygpt.nn.rotary import Scaling, apply_rope, frequencies
from polygpt.sharding import constrain
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Position(Spec):
    """A position encoding. A new one derives from this class and overrides `build`, `rotate` or `score`."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """A module `position_BT -> [B, T, D]`, added to the embeddings; None adds nothing."""
        return None

    def rotate(self, x_BHTd: jax.Array, position_BT: jax.Array, coordinate_BT3: jax.Array | None = None) -> jax.Array:
        """Queries or keys with positions applied.

        Args:
            x_BHTd: queries or keys.
            position_BT: int32, the index within the example.
            coordinate_BT3: int32 (time, row, column); None means that all three equal the position.
        """
        return x_BHTd

    def score(self) -> Any:
        """The score modification, a `polygpt.attention.scores.Score`; None leaves scores unchanged."""
        return None

    def adds(self) -> bool:
        """Whether it adds to the embeddings. The stack does this; an attention layer on its own cannot."""
        return type(self).build is not Position.build

    def limit(self) -> int | None:
        """The number of distinct positions that the encoding supports; None is unbounded."""
        return None


@dataclasses.dataclass(frozen=True)
class NoPosition(Position):
    """No encoding: causal decoders learn positions without one. Haviv et al. (2203.16634)."""


@dataclasses.dataclass(frozen=True)
class Learned(Position):
    """One learned vector per position. Gehring et al. (1705.03122), section 3.1."""

    length: int = 1024
    """Number of positions; longer examples are rejected when rows are built."""

    def validate(self):
        self.require(self.length >= 1, "length", "at least 1")

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return _Learned(self.length, width, rngs)

    def limit(self) -> int | None:
        return self.length


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Position):
    """Sines, then cosines, of geometrically spaced frequencies. Vaswani et al. (1706.03762), section 3.5.

    Layout and spacing follow the authors' code (tensor2tensor) and Whisper: the longest wavelength is 2 pi `base`.
    """

    base: float = 10000.0
    """The ratio of the longest to the shortest wavelength."""

    def validate(self):
        self.require(self.base > 1, "base", "above 1")

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        if width % 2 or width < 4:
            raise SpecError(f"{type(self).__name__} needs an even width of at least 4, not {width}: change the width")
        return _Sinusoidal(self.base, width)


@dataclasses.dataclass(frozen=True)
class Rope(Position):
    """Rotary encoding: rotates pairs of channels by an angle proportional to the position. Su et al. (2104.09864),
    eq. 34.

    A pair is channels i and i + d/2, as in GPT-NeoX and Llama.
    """

    base: float = 10000.0
    """The base of the geometric series of frequencies."""
    fraction: float = 1.0
    """Fraction of a head's channels to rotate, from the first. Black et al., GPT-NeoX (2204.06745), use a quarter."""
    scaling: Scaling | None = None
    """Extends the context beyond training: `polygpt.nn.rotary:YaRN`, `NTK` or `LinearScaling`; null is none."""

    def validate(self):
        self.require(self.base > 1, "base", "above 1")
        self.require(0 < self.fraction <= 1, "fraction", "above 0 and at most 1")

    def rotate(self, x_BHTd: jax.Array, position_BT: jax.Array, coordinate_BT3: jax.Array | None = None) -> jax.Array:
        width = x_BHTd.shape[-1]
        if width % 2:
            raise SpecError(f"{type(self).__name__} needs an even head width, not {width}: change heads or head_width")
        pairs = round(self.fraction * width / 2)
        self.require(pairs >= 1, "fraction", f"large enough to rotate two of {width} channels")
        angle_BTf = self.angles(position_BT, coordinate_BT3, pairs)
        return apply_rope(x_BHTd, angle_BTf, 1.0 if self.scaling is None else self.scaling.temperature())

    def angles(self, position_BT: jax.Array, coordinate_BT3: jax.Array | None, pairs: int) -> jax.Array:
        """The rotation of each pair of channels in radians, float32 [B, T, pairs]."""
        return position_BT[..., None].astype(jnp.float32) * self.frequencies(pairs)[None, None, :]

    def frequencies(self, pairs: int) -> jax.Array:
        """Radians per position for each of `pairs` pairs of channels, float32."""
        return (self.scaling.frequencies if self.scaling else frequencies)(self.base, pairs)


@dataclasses.dataclass(frozen=True)
class Rope2D(Rope):
    """Axial rotary encoding of a grid: half of the pairs rotate by row, half by column. Heo et al. (2403.13298).

    Both halves have the same frequencies, as in the vision towers of EVA-02 (2303.11331) and Qwen2-VL (2409.12191); Heo
    et al. use base 100. Meant for image towers, where positions have rows and columns; for a decoder see `MRope`.
    """

    def angles(self, position_BT: jax.Array, coordinate_BT3: jax.Array | None, pairs: int) -> jax.Array:
        if pairs % 2:
            raise SpecError(
                f"{type(self).__name__} must rotate a multiple of 4 channels per head, not {2 * pairs}: "
                "change heads, head_width or its fraction"
            )
        axis_f, frequency_f = np.repeat([1, 2], pairs // 2), jnp.tile(self.frequencies(pairs // 2), 2)
        return _angles_of(position_BT, coordinate_BT3, axis_f, frequency_f)


@dataclasses.dataclass(frozen=True)
class MRope(Rope):
    """Multimodal rotary encoding: each pair rotates by time, row or column. Wang et al., Qwen2-VL (2409.12191), section
    2.1.

    For text all three equal the position, so it reduces to `Rope`. The first pairs are temporal, as in the authors'
    code.
    """

    sections: tuple[int, int, int] | None = None
    """Pairs of channels for time, row and column; null is the ratio 2 : 3 : 3, as the 16, 24 and 24 of Qwen2-VL."""

    def angles(self, position_BT: jax.Array, coordinate_BT3: jax.Array | None, pairs: int) -> jax.Array:
        space = (3 * pairs + 2) // 8
        sections = self.sections or (pairs - 2 * space, space, space)
        self.require(sum(sections) == pairs and min(sections) >= 0, "sections", f"null or sum to {pairs}")
        return _angles_of(position_BT, coordinate_BT3, np.repeat(range(3), sections), self.frequencies(pairs))


def _angles_of(position_BT, coordinate_BT3, axis_f, frequency_f) -> jax.Array:
    """The angles [B, T, f], given the coordinate axis and the frequency of each pair of channels."""
    place_BTf = position_BT[..., None] if coordinate_BT3 is None else coordinate_BT3[..., axis_f]
    return place_BTf.astype(jnp.float32) * frequency_f[None, None, :]


class _Learned(nnx.Module):
    def __init__(self, length: int, width: int, rngs: nnx.Rngs):
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), (length, width)) * 0.02, axes=(None, "width"), decays=False
        )

    def __call__(self, position_BT: jax.Array) -> jax.Array:
        # Replicate the table: a lookup reads whole rows.
        return jnp.take(constrain(self.table[...], None, None), position_BT, axis=0, mode="clip")


class _Sinusoidal(nnx.Module):
    def __init__(self, base: float, width: int):
        self.base, self.width = base, width

    def __call__(self, position_BT: jax.Array) -> jax.Array:
        half = self.width // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / (half - 1))
        angle = position_BT[..., None].astype(jnp.float32) * frequency[None, None, :]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
