"""Audio: log-mel spectrograms as in Whisper, from decoded recordings resampled with soxr."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import numpy as np
import scipy
import soxr

from polygpt.data.media.features import Features, read
from polygpt.data.media.recording import Recording
from polygpt.errors import BadRecord

RATES = (1_000, 768_000)
"""Bounds of a file's sample rate, in Hz."""
CHANNELS = 16
"""Maximum number of channels of a file."""
BLOCK = 256
"""Frames per Fourier transform call, few enough for the working set to fit in a core's cache."""


@dataclasses.dataclass(frozen=True)
class LogMel(Features):
    """Log-mel spectrograms [frames, mels] as in Whisper (arXiv 2212.04356), section 2.2.

    The power spectrogram (Hann window, reflection padding, one frame every `hop` samples) passes through mel filters of
    equal area; x = log10 of the result, clipped at 8 below its maximum; the feature is (x + 4) / 4. A clip of n samples
    has n // hop real frames; features beyond them are 0. Raw samples are float32 [n] in -1..1: the mean of the
    channels or, where they cancel each other, the loudest one (see `recording.down_mix`).
    """

    seconds: float = 30.0
    """Maximum duration of a clip. It sets the number of frames; longer recordings are rejected."""
    rate: int = 16_000
    """Sample rate of the raw samples, in Hz."""
    mels: int = 80
    """Number of mel filters, between 0 Hz and half the rate."""
    window: int = 400
    """Samples per window."""
    hop: int = 160
    """Samples between the starts of successive frames."""
    other_rates: Literal["resample", "refuse"] = "resample"
    """How to treat files with another sample rate."""

    def validate(self):
        self.require(RATES[0] <= self.rate <= RATES[1], "rate", f"in {RATES[0]}..{RATES[1]}")
        self.require(self.window >= 2, "window", "at least 2")
        self.require(0 < self.hop <= self.window, "hop", "positive and not above the window")
        self.require(0 < self.mels, "mels", "positive")
        self.require(self.samples >= self.shortest, "seconds", f"at least {self.shortest / self.rate:.4f}")
        empty = int((_filters(self.rate, self.window, self.mels).max(axis=0) == 0).sum())
        self.require(empty == 0, "mels", f"fewer: {empty} filters lie between the bins of {self.window} samples")

    @property
    def samples(self) -> int:
        """Maximum number of samples of a clip."""
        return round(self.seconds * self.rate)

    @property
    def shortest(self) -> int:
        """Minimum number of samples: reflection padding needs more than half a window, a frame needs one hop."""
        return max(self.window // 2 + 1, self.hop)

    @property
    def frames(self) -> int:
        """Maximum number of frames of a clip."""
        return self.samples // self.hop

    @property
    def shape(self) -> tuple[int, int]:
        return self.frames, self.mels

    def decode(self, source: bytes | Path, place: str) -> np.ndarray:
        recording = Recording(read(source, place), place)
        rate = recording.rate
        self._check_header(rate, recording.channels, recording.samples, place)
        samples = recording.decode()
        if rate != self.rate and len(samples):
            # A clip that is too long by up to half a sample passes the check above, and the resampler rounds up.
            samples = soxr.resample(samples, rate, self.rate)[: self.samples]
        if not len(samples):
            raise BadRecord("empty audio", place)
        if len(samples) < self.shortest:
            raise BadRecord("too short", place, f"{len(samples)} samples at {self.rate} Hz, at least {self.shortest}")
        return np.ascontiguousarray(samples)

    def _check_header(self, rate: int, channels: int, samples: int, place: str) -> None:
        """Checks the header, before anything is decoded."""
        if not RATES[0] <= rate <= RATES[1]:
            raise BadRecord("wrong rate", place, f"{rate} Hz, outside {RATES[0]}..{RATES[1]}")
        if rate != self.rate and self.other_rates == "refuse":
            raise BadRecord("wrong rate", place, f"{rate} Hz instead of {self.rate}; other_rates='resample' takes any")
        if channels > CHANNELS:
            raise BadRecord("too many channels", place, f"{channels}, at most {CHANNELS}")
        if samples / rate > self.seconds + 0.5 / self.rate:
            detail = f"{samples / rate:.3f} seconds, at most {self.seconds:g}: shorten the recording, or raise "
            raise BadRecord("too long", place, detail + "model.adapters.NAME.features.seconds")

    def extract(self, raw: np.ndarray) -> tuple[np.ndarray, int]:
        """See the class. Clips that augmentation made too long are cut, those made too short are padded."""
        raw = raw[: self.samples]
        if len(raw) < self.shortest:
            raw = np.pad(raw, (0, self.shortest - len(raw)))
        frames, half = len(raw) // self.hop, self.window // 2
        padded = np.concatenate([raw[half:0:-1], raw, raw[-2 : -half - 2 : -1]])
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:frames]
        hann, filters = _hann(self.window), _filters(self.rate, self.window, self.mels)
        power = np.empty((frames, self.mels), np.float32)
        for start in range(0, frames, BLOCK):
            # SciPy vectorises over windows and is five times as fast as NumPy here.
            spectrum = scipy.fft.rfft(windows[start : start + BLOCK] * hann, overwrite_x=True)
            power[start : start + BLOCK] = (np.square(spectrum.real) + np.square(spectrum.imag)) @ filters
        x = np.log10(np.maximum(power, 1e-10))
        features = np.zeros(self.shape, np.float32)
        features[:frames] = (np.maximum(x, x.max() - 8) + 4) / 4
        return features, frames

    def real(self, features: np.ndarray, frames: int) -> np.ndarray:
        return features[:frames]

    def picture(self, features: np.ndarray, frames: int) -> np.ndarray:
        return features[:frames].T[::-1]


@functools.cache
def _hann(window: int) -> np.ndarray:
    """The periodic Hann window."""
    return np.square(np.sin(np.pi * np.arange(window) / window)).astype(np.float32)


@functools.cache
def _filters(rate: int, window: int, mels: int) -> np.ndarray:
    """Mel filters [window // 2 + 1, mels]: triangles of equal area on Slaney's scale (Auditory Toolbox, 1998).

    That scale is linear up to 1,000 Hz (200/3 Hz per mel) and logarithmic beyond (27 mels per factor of 6.4).
    """
    top = rate / 2
    top = top * 3 / 200 if top < 1000 else 15 + 27 * np.log(top / 1000) / np.log(6.4)
    mel = np.linspace(0, top, mels + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
    bins = np.linspace(0, rate / 2, window // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])).astype(np.float32)
