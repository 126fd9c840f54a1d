"""Images: patches, a small vision transformer, a connector.

Dosovitskiy et al., ViT (2010.11929), section 3.1, without the class token: every patch becomes a position of the
decoder, as in PaliGemma (2407.07726), section 3.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.adapters.base import Adapter, Connector
from polygpt.adapters.tower import Tower
from polygpt.blocks.stack import StackSpec
from polygpt.data.media.features import Features
from polygpt.data.media.image import ImageFeatures
from polygpt.nn.linear import Linear
from polygpt.nn.losses import Losses
from polygpt.nn.positions import Learned, NoPosition
from polygpt.sequence import Media


@dataclasses.dataclass(frozen=True)
class ImageAdapter(Adapter):
    """Square patches in row-major order, a transformer over them, and a connector to the decoder."""

    features: Features = ImageFeatures()
    """Size, channels and normalisation of the images."""
    patch: int = 8
    """Side of a patch in pixels; it must divide the height and the width."""
    tower: StackSpec = StackSpec(width=64, depth=2)
    """The vision transformer, by default with one learned vector per patch; `Rope2D` is an alternative."""
    connector: Connector = Connector()
    """Projects from the tower's width to the decoder's."""

    def validate(self):
        height, width, _ = self.features.shape
        self.require(self.patch >= 1, "patch", "at least 1")
        fits = height % self.patch == 0 and width % self.patch == 0
        self.require(fits, "patch", f"a divisor of the image's height and width, {height} x {width}")
        self.require(self.items >= 1, "items", "at least 1")

    @property
    def positions(self) -> int:
        _, rows, columns = self.grid
        return rows * columns

    @property
    def grid(self) -> tuple[int, int, int]:
        height, width, _ = self.features.shape
        return 1, height // self.patch, width // self.patch

    @property
    def idle(self) -> Mapping[str, int]:
        return {"tower": self.tower.idle()}

    @property
    def score_flops(self) -> float:
        return self.positions * self.tower.score_flops(self.positions)

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
        return _ImageAdapter(self, width, rngs, dtype)


def patches(pixels_BHWC: jax.Array, side: int) -> jax.Array:
    """[B, H, W, C] -> [B, H/side * W/side, side * side * C]: patches, and pixels within a patch, in row-major order."""
    B, H, W, C = pixels_BHWC.shape
    grid = pixels_BHWC.reshape(B, H // side, side, W // side, side, C).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(B, (H // side) * (W // side), side * side * C)


class _ImageAdapter(nnx.Module):
    def __init__(self, spec: ImageAdapter, width: int, rngs: nnx.Rngs, dtype: str):
        self.side = spec.patch
        channels = spec.features.shape[-1]
        tower = spec.tower
        if tower.position == NoPosition():
            tower = tower.replace(position=Learned(spec.positions))
        self.patch = Linear(
            spec.patch**2 * channels, tower.width, rngs=rngs, bias=True, dtype=dtype, axes=(None, "width")
        )
        self.tower = Tower(tower, rngs=rngs, dtype=dtype, grid=spec.grid)
        self.connector = spec.connector.build(tower.width, width, rngs=rngs, dtype=dtype)

    def __call__(self, media: Media, key: jax.Array | None = None) -> tuple[jax.Array, Losses]:
        """[B, N, H, W, C] -> ([B, N, P, D], losses)."""
        B, N, *shape = media.features.shape
        length_B = media.length_BN.reshape(B * N)
        pixels = jnp.where((length_B > 0)[:, None, None, None], media.features.reshape(B * N, *shape), 0)
        x_BPD, losses = self.encode(pixels, length_B, key)
        x_BPD = self.connector(x_BPD)
        return x_BPD.reshape(B, N, *x_BPD.shape[1:]), losses

    def encode(
        self, pixels_BHWC: jax.Array, length_B: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, Losses]:
        """Pixels to the tower's output, [B, P, width of the tower], and its losses."""
        return self.tower(self.patch(patches(pixels_BHWC, self.side)), length_B, key)
