"""Augmentations: random changes of media in training. All randomness comes from the generator that is passed in."""

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np
import soxr
from PIL import Image

from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Augment(Spec):
    """A random change of one item, applied after decoding ("raw") or after feature extraction ("features")."""

    modality: ClassVar[str]
    """The modality of its input."""
    stage: ClassVar[Literal["raw", "features"]]
    """Its input: raw samples (uint8 [h, w, 3] or float32 [samples]), or features without padding (see
    `Features.real`)."""

    def __call__(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a new array; `array` may be shared and must not be modified. Features keep their shape."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Augment):
    """A random rectangle of the image, resized to the size of the whole image.

    Szegedy et al., "Going Deeper with Convolutions" (1409.4842), section 6.
    """

    modality = "image"
    stage = "raw"

    area: tuple[float, float] = (0.08, 1.0)
    """Bounds of the rectangle's area, as a fraction of the image's."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Bounds of the rectangle's width / height, relative to the image's."""

    def validate(self):
        self.require(0 < self.area[0] <= self.area[1] <= 1, "area", "rising, in 0..1, above 0")
        self.require(0 < self.aspect[0] <= self.aspect[1], "aspect", "rising, above 0")

    def __call__(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        h, w = array.shape[:2]
        for _ in range(10):
            area = rng.uniform(*self.area)
            aspect = math.exp(rng.uniform(*map(math.log, self.aspect)))
            height, width = round(h * math.sqrt(area / aspect)), round(w * math.sqrt(area * aspect))
            if 0 < height <= h and 0 < width <= w:
                top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
                crop = Image.fromarray(array[top : top + height, left : left + width])
                return np.asarray(crop.resize((w, h), Image.Resampling.BICUBIC))
        return array.copy()


@dataclasses.dataclass(frozen=True)
class RandomShift(Augment):
    """Shifts the resized image by whole pixels and repeats its border."""

    modality = "image"
    stage = "features"

    share: float = 0.125
    """Largest shift in each direction, as a fraction of height and width."""

    def validate(self):
        self.require(0 <= self.share < 1, "share", "in 0..1, below 1")

    def __call__(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for axis, size in enumerate(array.shape[:2]):
            most = round(self.share * size)
            places = np.arange(size) - rng.integers(-most, most + 1)
            array = array.take(np.minimum(np.maximum(places, 0), size - 1), axis)
        return array


@dataclasses.dataclass(frozen=True)
class Speed(Augment):
    """Plays a recording faster or slower, which changes its pitch too.

    Ko et al., "Audio Augmentation for Speech Recognition" (Interspeech 2015), section 2.
    """

    modality = "audio"
    stage = "raw"

    factor: tuple[float, float] = (0.9, 1.1)
    """Bounds of the speed factor; 2 halves the duration."""

    def validate(self):
        self.require(0.1 <= self.factor[0] <= self.factor[1] <= 10, "factor", "rising, in 0.1..10")

    def __call__(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Round to hundredths: the resampler plans each ratio from scratch, and finer steps are inaudible.
        factor = round(rng.uniform(*self.factor), 2)
        return soxr.resample(array, factor, 1.0, quality="MQ")


@dataclasses.dataclass(frozen=True)
class Noise(Augment):
    """Adds white noise to a recording."""

    modality = "audio"
    stage = "raw"

    snr: tuple[float, float] = (10.0, 40.0)
    """Bounds of the signal-to-noise ratio in dB."""

    def validate(self):
        self.require(self.snr[0] <= self.snr[1], "snr", "rising")

    def __call__(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        power = float(np.mean(np.square(array, dtype=np.float64)))
        deviation = math.sqrt(power * 10 ** (-rng.uniform(*self.snr) / 10))
        return array + rng.standard_normal(len(array), np.float32) * np.float32(deviation)


@dataclasses.dataclass(frozen=True)
class SpecAugment(Augment):
    """Masks bands of mel bins and spans of time with the mean. Park et al. (1904.08779), section 2, without warping.

    The defaults are the paper's "LibriSpeech double" policy, whose widths assume 80 mel bins and a hop of 10 ms.
    """

    modality = "audio"
    stage = "features"

    frequency_masks: int = 2
    """Number of masked bands (m_F)."""
    frequency_width: int = 27
    """Largest width of a band in mel bins (F); each width is drawn from 0..F."""
    time_masks: int = 2
    """Number of masked spans of time (m_T)."""
    time_width: int = 100
    """Largest width of a span in frames (T); each width is drawn from 0..T."""
    time_share: float = 1.0
    """Largest fraction of a clip that one span masks (p)."""

    def validate(self):
        for field in ("frequency_masks", "frequency_width", "time_masks", "time_width"):
            self.require(getattr(self, field) >= 0, field, "0 or above")
        self.require(0 <= self.time_share <= 1, "time_share", "in 0..1")

    def __call__(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        frames, mels = array.shape
        masked, mean = array.copy(), array.mean()
        for _ in range(self.frequency_masks):
            start, stop = _span(mels, self.frequency_width, rng)
            masked[:, start:stop] = mean
        for _ in range(self.time_masks):
            start, stop = _span(frames, min(self.time_width, int(self.time_share * frames)), rng)
            masked[start:stop] = mean
        return masked


def _span(size: int, most: int, rng: np.random.Generator) -> tuple[int, int]:
    """A random span (start, stop) within 0..size; its width is drawn from 0..most."""
    width = int(rng.integers(min(most, size) + 1))
    start = int(rng.integers(size - width + 1))
    return start, start + width
