"""Small adapters and encoded media for the tests of generation."""

import io

import numpy as np
import soundfile
from PIL import Image

from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.blocks.stack import StackSpec
from polygpt.data.example import Medium
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures

TOWER = StackSpec(width=8, depth=0)  # generation does not depend on blocks there, which take long to compile
ADAPTERS = {
    "image": ImageAdapter(features=ImageFeatures(height=8, width=8, channels=1), patch=4, items=3, tower=TOWER),
    "audio": AudioAdapter(
        features=LogMel(rate=8000, mels=8, window=200, hop=80, seconds=0.2), fold=2, items=3, tower=TOWER
    ),
}


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG")
    return Medium("image", data.getvalue())


def recording(seed, samples):
    wave = np.random.default_rng(seed).uniform(-1, 1, samples)
    soundfile.write(data := io.BytesIO(), wave, 8000, format="WAV")
    return Medium("audio", data.getvalue())
