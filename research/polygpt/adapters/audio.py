"""Audio: a log-mel spectrogram, two strided convolutions, a transformer, a connector.

Radford et al., Whisper (2212.04356), section 2.2. Neighbouring positions can be folded into one before the connector: a
decoder learns speech much faster from twelve positions per second of audio than from fifty.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.adapters.base import Adapter, Connector
from polygpt.adapters.tower import Tower
from polygpt.blocks.stack import StackSpec
from polygpt.data.media.audio import LogMel
from polygpt.data.media.features import Features
from polygpt.nn.convolution import TimeConvolution
from polygpt.nn.losses import Losses
from polygpt.nn.mlp import activate
from polygpt.nn.positions import NoPosition, Sinusoidal
from polygpt.sequence import Media


@dataclasses.dataclass(frozen=True)
class AudioAdapter(Adapter):
    """Convolutions of size 3 with strides 1 and 2, a transformer, folding of `fold` positions, and a connector."""

    features: Features = LogMel()
    """Sample rate, mel bins, hop and maximum duration of the recordings."""
    fold: int = 1
    """Number of successive tower positions per decoder position."""
    tower: StackSpec = StackSpec(width=64, depth=2)
    """The transformer, by default with sinusoidal positions."""
    connector: Connector = Connector()
    """Projects from the tower's width times `fold` to the decoder's width."""

    def validate(self):
        self.require(self.fold >= 1, "fold", "at least 1")
        self.require(self.items >= 1, "items", "at least 1")

    @property
    def positions(self) -> int:
        return self.length(self.features.shape[0])

    def length(self, frames: int) -> int:
        return max(1, -(-frames // (2 * self.fold)))  # the second convolution halves the number of frames

    @property
    def applications(self) -> Mapping[str, int]:
        inner = self.positions * self.fold
        return {"first": 2 * inner, "second": inner, "tower": inner}

    @property
    def idle(self) -> Mapping[str, int]:
        return {"tower": self.tower.idle()}

    @property
    def score_flops(self) -> float:
        inner = self.positions * self.fold
        return inner * self.tower.score_flops(inner)

    def build(self, width: int, *, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
        return _AudioAdapter(self, width, rngs, dtype)


class _AudioAdapter(nnx.Module):
    def __init__(self, spec: AudioAdapter, width: int, rngs: nnx.Rngs, dtype: str):
        self.fold, self.positions = spec.fold, spec.positions
        mels = spec.features.shape[-1]
        tower = spec.tower
        if tower.position == NoPosition():
            tower = tower.replace(position=Sinusoidal())
        options = {"size": 3, "rngs": rngs, "dtype": dtype}
        self.first = TimeConvolution(mels, tower.width, stride=1, **options)
        self.second = TimeConvolution(tower.width, tower.width, stride=2, **options)
        self.tower = Tower(tower, rngs=rngs, dtype=dtype)
        self.connector = spec.connector.build(tower.width * spec.fold, width, rngs=rngs, dtype=dtype)

    def __call__(self, media: Media, key: jax.Array | None = None) -> tuple[jax.Array, Losses]:
        """[B, N, frames, M] -> ([B, N, P, D], losses)."""
        B, N, frames, M = media.features.shape
        inner = self.positions * self.fold
        length_B = media.length_BN.reshape(B * N) * self.fold
        # Zero the frames beyond an item's last position, so that its embedding depends neither on the contents of the
        # padding nor on the maximum duration.
        mel_BFM = jnp.pad(media.features.reshape(B * N, frames, M), ((0, 0), (0, 2 * inner - frames), (0, 0)))
        real = jnp.arange(2 * inner)[None, :, None] < 2 * length_B[:, None, None]
        x_BTD, losses = self.encode(jnp.where(real, mel_BFM, 0), length_B, key)
        return self.connector(x_BTD.reshape(B, N, self.positions, -1)), losses

    def encode(self, mel_BFM: jax.Array, length_B: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Losses]:
        """Log-mel frames to the tower's output, [B, ceil(frames / 2), width of the tower], and its losses."""
        x_BTD = activate("gelu", self.second(activate("gelu", self.first(mel_BFM))))
        return self.tower(x_BTD, length_B, key)
