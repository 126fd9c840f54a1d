"""Recordings: decoding, what is refused and how, parity of the log-mel with librosa, SciPy and Whisper."""

import importlib.util
import io
from pathlib import Path

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data.media.audio import LogMel, _filters
from polygpt.errors import BadRecord, SpecError

RATE = 16_000


def tone(seconds: float, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def speech_like(seconds: float) -> np.ndarray:
    """A chirp of harmonics in noise, with silence in the middle: the clamp at the maximum less 8 comes into play."""
    t = np.arange(round(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * (150 * k * t + 40 * t * t)) / k for k in range(1, 12))
    wave = wave * (np.abs(t - seconds / 2) > seconds / 8)
    return (0.1 * wave + 1e-7 * np.random.default_rng(0).standard_normal(len(t))).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, format: str = "FLAC", **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, **options)
    return buffer.getvalue()


def reference(samples: np.ndarray, mels: int) -> np.ndarray:
    """Whisper's log-mel computed with SciPy's transform and librosa's filters, [frames, mels].

    Not with librosa's transform: its module makes numba compile for 13 s.
    """
    padded = np.pad(samples.astype(np.float64), 200, mode="reflect")
    _, _, bins = scipy.signal.stft(padded, window="hann", nperseg=400, noverlap=240, boundary=None, padded=False)
    power = np.abs(bins[:, :-1] * scipy.signal.get_window("hann", 400).sum()) ** 2
    mel = librosa.filters.mel(sr=RATE, n_fft=400, n_mels=mels) @ power
    x = np.log10(np.maximum(mel, 1e-10))
    return ((np.maximum(x, x.max() - 8) + 4) / 4).T


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, window, mels", [(16_000, 400, 80), (16_000, 400, 128), (8_000, 256, 40), (1_600, 400, 20)]
)
def test_filters_equal_librosas(rate, window, mels):
    expected = librosa.filters.mel(sr=rate, n_fft=window, n_mels=mels).T
    np.testing.assert_allclose(_filters(rate, window, mels), expected, atol=1e-7)


@pytest.mark.parametrize("mels", [80, 128])
def test_filters_equal_whispers(mels):
    package = importlib.util.find_spec("whisper")
    if package is None:
        pytest.skip("openai-whisper is not installed: its mel filters are not compared")
    with np.load(Path(package.origin).parent / "assets" / "mel_filters.npz") as assets:
        np.testing.assert_allclose(_filters(RATE, 400, mels).T, assets[f"mel_{mels}"], atol=1e-7)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.1, 1.234, 6.0])  # 6 seconds are several blocks of frames
def test_log_mel_equals_scipys_and_librosas(mels, seconds):
    samples = speech_like(seconds)
    features, frames = LogMel(seconds=7, mels=mels).extract(samples)
    expected = reference(samples, mels)
    assert frames == len(expected) == len(samples) // 160
    np.testing.assert_allclose(features[:frames], expected, atol=1e-4)
    assert features.shape == (700, mels) and not features[frames:].any()


@pytest.mark.parity
def test_log_mel_equals_whispers():
    torch = pytest.importorskip("torch")
    package = importlib.util.find_spec("whisper")
    if package is None:
        pytest.skip("openai-whisper is not installed: its log-mel is not compared")
    with np.load(Path(package.origin).parent / "assets" / "mel_filters.npz") as assets:
        filters = torch.from_numpy(assets["mel_80"])
    samples = speech_like(3.0)
    # whisper.audio.log_mel_spectrogram, line by line; the package itself imports decoders that are not needed here.
    stft = torch.stft(torch.from_numpy(samples), 400, 160, window=torch.hann_window(400), return_complex=True)
    log_spec = torch.clamp(filters @ (stft[..., :-1].abs() ** 2), min=1e-10).log10()
    log_spec = (torch.maximum(log_spec, log_spec.max() - 8.0) + 4.0) / 4.0
    features, frames = LogMel(seconds=3).extract(samples)
    np.testing.assert_allclose(features[:frames], log_spec.numpy().T, atol=1e-4)


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, tolerance", [("FLAC", 1e-4), ("WAV", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_formats_decode(format, tolerance, tmp_path):
    samples = tone(0.5)
    (tmp_path / "a").write_bytes(encoded(samples, format=format))
    raw = LogMel(seconds=1).decode(tmp_path / "a", "record")
    assert raw.dtype == np.float32 and len(raw) == len(samples)
    middle = slice(2000, 6000)
    np.testing.assert_allclose(raw[middle], samples[middle], atol=tolerance)


def test_channels_are_averaged():
    stereo = np.stack([tone(0.1), np.zeros(1600, np.float32)], axis=1)
    np.testing.assert_allclose(LogMel().decode(encoded(stereo), "record"), tone(0.1) / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(rate):
    raw = LogMel(seconds=1).decode(encoded(tone(1.0, rate), rate), "record")
    assert len(raw) == RATE
    np.testing.assert_allclose(raw[2000:-2000], tone(1.0)[2000:-2000], atol=1e-3)


def test_other_rates_can_be_refused():
    spec = LogMel(other_rates="refuse")
    assert len(spec.decode(encoded(tone(0.1)), "record")) == 1600
    with pytest.raises(BadRecord, match=r"^a\.wav: wrong rate: 8000 Hz instead of 16000"):
        spec.decode(encoded(tone(0.1, 8_000), 8_000), "a.wav")


def huge_wav(rate: int) -> bytes:
    data = bytearray(encoded(tone(0.1), format="WAV"))
    data[24:28] = rate.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "source, reason",
    [
        (b"", "empty file"),
        (b"no recording at all, but some text", "unknown audio format"),
        (encoded(tone(1.0))[:9000], "corrupt audio"),
        (encoded(tone(1.0))[:60], "corrupt audio"),
        (encoded(tone(1.0), format="WAV")[:9000], "corrupt audio"),
        (encoded(np.zeros(0, np.float32), format="WAV"), "empty audio"),
        (encoded(np.full(1600, np.nan, np.float32), format="WAV", subtype="FLOAT"), "corrupt audio"),
        (encoded(np.full(1600, np.inf, np.float32), format="WAV", subtype="FLOAT"), "corrupt audio"),
        (encoded(tone(0.01)), "too short"),
        (encoded(tone(2.001)), "too long"),
        (encoded(tone(2.1, 8_000), 8_000), "too long"),
        (encoded(np.zeros((1600, 17), np.float32), format="WAV"), "too many channels"),
        (huge_wav(2_000_000_000), "wrong rate"),
        (huge_wav(0), "corrupt audio"),
    ],
)
def test_bad_recordings_are_refused_by_name(source, reason):
    with pytest.raises(BadRecord, match=r"^clips, record 3: ") as caught:
        LogMel(seconds=2).decode(source, "clips, record 3")
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_a_recording_that_is_too_long_is_refused_naming_the_field_to_raise():
    with pytest.raises(BadRecord, match=r"2\.500 seconds, at most 2: .*model\.adapters\.NAME\.features\.seconds$"):
        LogMel(seconds=2).decode(encoded(tone(2.5)), "record")


def test_a_clip_half_a_sample_beyond_the_bound_is_cut_to_it():
    raw = LogMel(seconds=1, rate=8_000).decode(encoded(tone(16_001 / 16_000)), "record")
    assert len(raw) == 8_000
    np.testing.assert_allclose(raw[500:-500], tone(1.0, 8_000)[500:-500], atol=1e-3)
    with pytest.raises(BadRecord, match="too long"):
        LogMel(seconds=1, rate=8_000).decode(encoded(tone(16_002 / 16_000)), "record")


def test_a_clip_of_exactly_the_bound_is_taken():
    assert LogMel(seconds=2).extract(LogMel(seconds=2).decode(encoded(tone(2.0)), "record"))[1] == 200


@given(at=st.integers(4, 3000), value=st.integers(1, 255))
def test_damaged_bytes_never_raise_anything_else(at, value):
    data = bytearray(encoded(speech_like(0.1)))
    data[at % len(data)] ^= value
    try:
        raw = LogMel(seconds=1).decode(bytes(data), "record")
    except BadRecord:
        return
    assert raw.dtype == np.float32 and np.isfinite(raw).all()


@given(st.integers(201, 40_000))
def test_every_length_gives_the_static_shape(samples):
    spec = LogMel(seconds=2, mels=20)
    features, frames = spec.extract(np.random.default_rng(samples).standard_normal(samples).astype(np.float32))
    assert features.shape == spec.shape == (200, 20) and features.dtype == np.float32
    assert frames == min(samples, 32_000) // 160
    assert np.isfinite(features).all() and not features[frames:].any()
    assert spec.real(features, frames).shape == (frames, 20) and spec.picture(features, frames).shape == (20, frames)


def test_silence_is_finite():
    features, frames = LogMel(seconds=1).extract(np.zeros(RATE, np.float32))
    np.testing.assert_allclose(features[:frames], -1.5, rtol=1e-6)


@pytest.mark.parametrize("fields", [{"hop": 0}, {"rate": 10}, {"seconds": 0.001}, {"mels": 400}])
def test_fields_out_of_bounds_are_named(fields):
    with pytest.raises(SpecError, match=f"LogMel.{next(iter(fields))} is"):
        LogMel(**fields)
