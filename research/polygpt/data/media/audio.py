"""Recordings: decoding with soundfile, resampling with soxr, log-mel spectrograms as Whisper reads them."""

import dataclasses
import functools
import io
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.fft
import soundfile
import soxr

from polygpt.data.media.features import Features, read
from polygpt.errors import BadRecord

RATES = (1_000, 768_000)
"""Sample rates, in Hz, that a file may state."""
CHANNELS = 16
"""Most channels that a file may have."""
BLOCK = 256
"""Frames transformed at a time, so that the work stays in the cache of a core."""


@dataclasses.dataclass(frozen=True)
class LogMel(Features):
    """Log-mel spectrograms [frames, mels] as in Whisper (arXiv 2212.04356), section 2.2.

    The power of a short-time Fourier transform (Hann window, ends padded by reflection, one frame every `hop` samples)
    through mel filters of equal area; x = log10 of that, not below its maximum less 8; the feature is (x + 4) / 4. A
    clip of n samples has n // hop real frames; features beyond them are 0. Raw samples are float32 [n] in -1..1.
    """

    seconds: float = 30.0
    """The longest clip. Sets the number of frames."""
    rate: int = 16_000
    """Sample rate in Hz of the raw samples."""
    mels: int = 80
    """Number of mel filters, between 0 Hz and half the rate."""
    window: int = 400
    """Samples a window."""
    hop: int = 160
    """Samples from a frame to the next."""
    other_rates: Literal["resample", "refuse"] = "resample"
    """What becomes of a file of another sample rate."""

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
        """The most samples of a clip."""
        return round(self.seconds * self.rate)

    @property
    def shortest(self) -> int:
        """The fewest samples of a clip: reflection needs more than half a window, a frame needs a hop."""
        return max(self.window // 2 + 1, self.hop)

    @property
    def frames(self) -> int:
        """Frames of the longest clip."""
        return self.samples // self.hop

    @property
    def shape(self) -> tuple[int, int]:
        return self.frames, self.mels

    def decode(self, source: bytes | Path, place: str) -> np.ndarray:
        encoded = read(source, place)
        if encoded[:4] == b"RIFF":
            _refuse_truncated_riff(encoded, place)
        try:
            with soundfile.SoundFile(io.BytesIO(encoded)) as file:
                rate, stated = file.samplerate, file.frames
                self._refuse(rate, file.channels, stated, place)
                # One sample more than allowed tells too long a clip whose header states another length.
                channels = file.read(int(self.seconds * rate) + rate // 100 + 2, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            known = encoded[:4] in (b"RIFF", b"fLaC", b"OggS", b"FORM") or encoded[:3] == b"ID3"
            raise BadRecord("corrupt audio" if known else "unknown audio format", place, error.error_string) from error
        if len(channels) < stated:
            raise BadRecord("corrupt audio", place, f"{len(channels)} of the {stated} samples it states can be decoded")
        samples = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1)
        if not np.isfinite(samples).all():
            raise BadRecord("corrupt audio", place, "samples that are not finite")
        if rate != self.rate and len(samples):
            samples = soxr.resample(samples, rate, self.rate)[: round(len(samples) * self.rate / rate)]
        return self._refuse_length(np.ascontiguousarray(samples), place)

    def _refuse(self, rate: int, channels: int, samples: int, place: str) -> None:
        """Judges by the header, before anything is decoded."""
        if not RATES[0] <= rate <= RATES[1]:
            raise BadRecord("wrong rate", place, f"{rate} Hz, outside {RATES[0]}..{RATES[1]}")
        if rate != self.rate and self.other_rates == "refuse":
            raise BadRecord("wrong rate", place, f"{rate} Hz instead of {self.rate}; other_rates='resample' takes any")
        if channels > CHANNELS:
            raise BadRecord("too many channels", place, f"{channels}, at most {CHANNELS}")
        if samples / rate > self.seconds + 0.5 / self.rate:
            raise BadRecord("too long", place, f"{samples / rate:.3f} seconds, at most {self.seconds:g}")

    def _refuse_length(self, samples: np.ndarray, place: str) -> np.ndarray:
        if not len(samples):
            raise BadRecord("empty audio", place)
        if len(samples) < self.shortest:
            raise BadRecord("too short", place, f"{len(samples)} samples at {self.rate} Hz, at least {self.shortest}")
        if len(samples) > self.samples:
            raise BadRecord("too long", place, f"{len(samples) / self.rate:.3f} seconds, at most {self.seconds:g}")
        return samples

    def extract(self, raw: np.ndarray) -> tuple[np.ndarray, int]:
        """As the class says. What an augmentation made too long is cut off, what it made too short is padded."""
        raw = raw[: self.samples]
        if len(raw) < self.shortest:
            raw = np.pad(raw, (0, self.shortest - len(raw)))
        frames, half = len(raw) // self.hop, self.window // 2
        padded = np.concatenate([raw[half:0:-1], raw, raw[-2 : -half - 2 : -1]])
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:frames]
        hann, filters = _hann(self.window), _filters(self.rate, self.window, self.mels)
        power = np.empty((frames, self.mels), np.float32)
        for start in range(0, frames, BLOCK):
            # SciPy transforms several windows at once in one vector register; NumPy takes five times longer.
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


def _refuse_truncated_riff(encoded: bytes, place: str) -> None:
    """libsndfile reads a WAV file that ends early as a shorter one."""
    stated = int.from_bytes(encoded[4:8], "little")
    if len(encoded) < stated + 8 and stated < 0xFFFFF000:  # sizes near the top are a stream's "not known"
        raise BadRecord("corrupt audio", place, f"truncated: {len(encoded)} of {stated + 8} bytes")


@functools.cache
def _hann(window: int) -> np.ndarray:
    """The periodic Hann window."""
    return np.square(np.sin(np.pi * np.arange(window) / window)).astype(np.float32)


@functools.cache
def _filters(rate: int, window: int, mels: int) -> np.ndarray:
    """Mel filters [window // 2 + 1, mels]: triangles of equal area on Slaney's scale (Auditory Toolbox, 1998).

    That scale is linear up to 1,000 Hz, 200/3 Hz a mel, and logarithmic beyond: 27 mels for a factor of 6.4.
    """
    top = rate / 2
    top = top * 3 / 200 if top < 1000 else 15 + 27 * np.log(top / 1000) / np.log(6.4)
    mel = np.linspace(0, top, mels + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
    bins = np.linspace(0, rate / 2, window // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])).astype(np.float32)
