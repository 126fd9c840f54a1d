"""Presets by name, from laptop to pod size. Names round the size; `polygpt model show NAME` gives exact counts.

All use a common modern decoder (RMSNorm, SwiGLU, rotary positions, heads of 32 to 128 channels, grouped-query attention
in the large ones) with a vision transformer and a Whisper-like audio tower of matching size; the largest is text-only.
"""

import dataclasses

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.base import Adapter, Connector
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.errors import SpecError
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.mlp import GatedMLP
from polygpt.nn.positions import Learned, Sinusoidal
from polygpt.spec import nearest

BYTES = 258
"""Vocabulary of the byte tokenizer: 256 bytes and two special ids."""
SUBWORDS = 50_304
"""Vocabulary of GPT-2's tokenizer, rounded up to a multiple of 128."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model size.

    Attributes:
        width, depth, heads, kv_heads: of the decoder.
        tower: width, depth and heads of both media towers; None for a text-only model.
        pixels, patch: side of the square images and of their patches.
        seconds: maximum duration of recordings.
        fold: number of audio tower positions per decoder position.
        vocabulary: the number of token ids for which the size was chosen.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    tower: tuple[int, int, int] | None
    pixels: int = 224
    patch: int = 14
    seconds: float = 30.0
    fold: int = 8
    vocabulary: int = SUBWORDS

    def model(self) -> ModelSpec:
        """The specification."""
        large = self.width >= 1024
        decoder = DecoderSpec(
            self.width,
            self.depth,
            MultiHead(self.heads, self.kv_heads),
            GatedMLP(multiple=256 if large else 8),  # whole TPU matrix unit tiles even when split over devices
            tied=self.width < 2048,
            remat="full" if large else "none",
        )
        dtype = "float32" if self.vocabulary == BYTES else "bfloat16"
        return ModelSpec(decoder, self._adapters() if self.tower else {}, dtype)

    def _adapters(self) -> dict[str, Adapter]:
        width, depth, heads = self.tower
        image = ImageAdapter(ImageFeatures(self.pixels, self.pixels), 4, self.patch)
        encoder = StackSpec(width, depth, MultiHead(heads, bias=True), position=Learned(image.positions))
        audio_encoder = encoder.replace(position=Sinusoidal(), attention=MultiHead(heads, bias=True, key_bias=False))
        audio = AudioAdapter(LogMel(self.seconds), 4, self.fold, audio_encoder, Connector("mlp"))
        return {"image": image.replace(tower=encoder, connector=Connector("mlp")), "audio": audio}


PRESETS = {
    "1m": Preset(128, 4, 4, 4, (64, 2, 2), 32, 8, 2.0, 4, BYTES),
    "10m": Preset(320, 6, 5, 5, (192, 4, 3), 64, 16, 4.0, 4, BYTES),
    "150m": Preset(768, 12, 12, 12, (384, 6, 6), patch=16),
    "400m": Preset(1024, 24, 16, 16, (512, 8, 8), patch=16),
    "1b": Preset(2048, 16, 32, 8, (768, 12, 12)),
    "3b": Preset(3072, 24, 24, 8, (1152, 16, 16)),
    "7b": Preset(4096, 32, 32, 8, (1152, 27, 16)),
    "32b": Preset(7168, 60, 56, 8, None),
}
"""The sizes, by name."""


def preset(name: str) -> Preset:
    """The preset called `name`. Raises SpecError with the nearest names if there is none."""
    if name not in PRESETS:
        raise SpecError(f"no preset {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]
