"""Small adapters, encoded media and examples for the tests of layout, packing and loader."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import soundfile
from PIL import Image

from polygpt.data.example import Example, Medium, Text
from polygpt.data.media.audio import LogMel
from polygpt.data.media.features import Features
from polygpt.data.media.image import ImageFeatures
from polygpt.data.sources.base import Source
from polygpt.errors import BadRecord


@dataclasses.dataclass(frozen=True)
class SmallAdapter:
    """What the data pipeline needs to know of an adapter."""

    features: Features
    items: int
    positions: int
    frames: int
    """Frames of an item that fills all its positions."""
    grid: tuple[int, int, int]

    def length(self, frames: int) -> int:
        return -(-frames * self.positions // self.frames)


IMAGE = SmallAdapter(ImageFeatures(4, 4, channels=1), items=2, positions=4, frames=1, grid=(1, 2, 2))
SOUND = LogMel(seconds=0.25, rate=4000, window=64, hop=40, mels=8)
AUDIO = SmallAdapter(SOUND, items=1, positions=5, frames=25, grid=(5, 1, 1))
ADAPTERS = {"image": IMAGE, "audio": AUDIO}


def png(seed: int) -> bytes:
    """A picture of 4 x 4 random grey pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def flac(seed: int) -> bytes:
    """Noise of 0.05 to 0.25 seconds."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * rng.standard_normal(int(rng.integers(200, 1001))), 4000, format="FLAC")
    return buffer.getvalue()


def make_example(seed: int) -> Example:
    """Texts and media at random: up to two pictures and a recording, between them texts of weight 0 or 1."""
    rng = np.random.default_rng(seed)
    media = [Medium("image", png(seed + i)) for i in range(rng.integers(3))]
    media += [Medium("audio", flac(seed))] * int(rng.integers(2))
    parts = []
    for i in rng.permutation(len(media)):
        parts.append(media[i])
        if rng.random() < 0.5:
            parts.append(Text("p" * int(rng.integers(1, 4)), 0.0))
    parts.append(Text(f"answer {seed}" + "é" * int(rng.integers(4)), 1.0))
    return Example(tuple(parts), f"example {seed}")


class Examples(Sequence):
    """`make_example` of 0, 1, ...; every `bad`-th is unusable in one of several ways."""

    def __init__(self, count: int, bad: int = 0):
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < self.count:
            raise IndexError(i)
        if self.bad and i % self.bad == 0:
            if i % (2 * self.bad) == 0:
                raise BadRecord("made up", f"example {i}")
            return Example((Text("x" * 1000),), f"example {i}")
        return make_example(i)


@dataclasses.dataclass(frozen=True)
class FaultySource(Source):
    """Indexing fails as a mistake in a user's source does."""

    def open(self):
        return FaultyExamples()


class FaultyExamples:
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {}["answer"]


@dataclasses.dataclass(frozen=True)
class SmallSource(Source):
    """A source of `Examples`."""

    count: int = 30
    bad: int = 0

    def open(self) -> Sequence[Example]:
        return Examples(self.count, self.bad)
