"""Presets by name, from a laptop's size to a pod's. A name rounds the size; `polygpt model show NAME` counts exactly.

All are today's common decoder (RMSNorm, SwiGLU, rotary positions, heads of 32 to 128 channels, grouped queries where
large) with a vision transformer and a Whisper-like audio tower of a fitting size.
"""

import dataclasses

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.base import Connector
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.errors import SpecError
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.positions import Learned, Sinusoidal
from polygpt.spec import nearest

BYTES = 258
"""Vocabulary of the byte tokenizer: 256 bytes and two marks."""
SUBWORDS = 50_304
"""Vocabulary of GPT-2's tokenizer, rounded up to a multiple of 128."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size.

    Attributes:
        width, depth, heads, kv_heads: of the decoder.
        tower: width, depth and heads of both media towers.
        pixels, patch: side of the square pictures and of their patches.
        seconds: longest recording.
        fold: positions of the audio tower that become one of the decoder.
        vocabulary: the number of token ids that the size was chosen for.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    tower: tuple[int, int, int]
    pixels: int
    patch: int
    seconds: float
    fold: int
    vocabulary: int = SUBWORDS

    def model(self) -> ModelSpec:
        """The specification."""
        width, depth, heads = self.tower
        image = ImageAdapter(ImageFeatures(self.pixels, self.pixels), 4, self.patch)
        encoder = StackSpec(width, depth, MultiHead(heads, bias=True), position=Learned(image.positions))
        audio_encoder = encoder.replace(position=Sinusoidal(), attention=MultiHead(heads, bias=True, key_bias=False))
        audio = AudioAdapter(LogMel(self.seconds), 4, self.fold, audio_encoder, Connector("mlp"))
        decoder = DecoderSpec(
            self.width,
            self.depth,
            MultiHead(self.heads, self.kv_heads),
            tied=self.width < 2048,
            remat="none" if self.width < 1024 else "full",
        )
        dtype = "float32" if self.vocabulary == BYTES else "bfloat16"
        image = image.replace(tower=encoder, connector=Connector("mlp"))
        return ModelSpec(decoder, {"image": image, "audio": audio}, dtype)


PRESETS = {
    "1m": Preset(128, 4, 4, 4, (64, 2, 2), 32, 8, 2.0, 4, BYTES),
    "10m": Preset(320, 6, 5, 5, (192, 4, 3), 64, 16, 4.0, 4, BYTES),
    "150m": Preset(768, 12, 12, 12, (384, 6, 6), 224, 16, 30.0, 8),
    "400m": Preset(1024, 24, 16, 16, (512, 8, 8), 224, 16, 30.0, 8),
    "1b": Preset(2048, 16, 32, 8, (768, 12, 12), 224, 14, 30.0, 8),
    "3b": Preset(3072, 24, 24, 8, (1152, 16, 16), 224, 14, 30.0, 8),
    "7b": Preset(4096, 32, 32, 8, (1152, 27, 16), 224, 14, 30.0, 8),
}
"""The sizes, by name."""


def preset(name: str) -> Preset:
    """The preset called `name`; SpecError with the nearest names if there is none."""
    if name not in PRESETS:
        raise SpecError(f"no preset {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]
