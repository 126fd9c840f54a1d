"""Converts a raw recording to the stored form: mono, 8 kHz, trimmed, levelled, FLAC."""

import io

import numpy as np
import scipy.signal
import soundfile
import soxr

RATE = 8_000
HIGH_PASS = scipy.signal.butter(4, 70, "highpass", fs=RATE, output="sos")


def trim(samples: np.ndarray, rate: int, floor: float, before: float = 0.03, after: float = 0.05) -> np.ndarray:
    """Trims the silence around the speech, keeping `before` and `after` seconds of it.

    A frame of 10 ms is speech if its RMS is within `floor` dB of the loudest and over twice the noise floor (or within
    30 dB of the loudest, where the noise floor is higher).
    """
    hop = rate // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    rms = np.sqrt((frames**2).mean(1))
    noise = np.percentile(rms, 5)
    threshold = max(rms.max() * 10 ** (-floor / 20), min(2 * noise, rms.max() * 10 ** (-30 / 20)))
    loud = np.flatnonzero(rms > threshold)
    start = max(0, loud[0] * hop - int(before * rate))
    end = min(len(samples), (loud[-1] + 1) * hop + int(after * rate))
    return samples[start:end]


def prepare(samples: np.ndarray, rate: int, floor: float = 42) -> np.ndarray:
    """float32 [samples] at RATE: high-pass filtered below speech, trimmed, peak 0.9, ends faded over 5 ms."""
    if samples.ndim == 2:
        samples = samples.mean(1)
    samples = samples.astype(np.float32)
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE, quality="VHQ")
    samples = scipy.signal.sosfiltfilt(HIGH_PASS, samples).astype(np.float32)
    samples = trim(samples, RATE, floor)
    samples = samples * (0.9 / np.abs(samples).max())
    ramp = np.linspace(0, 1, RATE // 200, dtype=np.float32)
    samples[: len(ramp)] *= ramp
    samples[-len(ramp) :] *= ramp[::-1]
    return samples


def flac(samples: np.ndarray) -> bytes:
    """FLAC bytes with samples of 9 bits (noise 58 dB below the peak): FLAC omits empty low bits, half of the size."""
    step = 128
    integers = (np.round(samples * 32767 / step) * step).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, integers, RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return buffer.getvalue()
