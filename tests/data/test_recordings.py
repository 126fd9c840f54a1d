"""Recordings as files of every kind state them: complete ones load in full, truncated ones are refused."""

import io
import re
import struct

import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from polygpt.data.media.recording import Recording, down_mix
from polygpt.errors import BadRecord

RATE = 8_000
LIST = b"LIST\x0c\0\0\0INFOIART\0\0\0\0"


def voice(samples: int = 4_000, rate: int = RATE) -> np.ndarray:
    """A chirp: no two stretches are alike, so that a shift or a gap shows."""
    t = np.arange(samples) / rate
    return (0.4 * np.sin(2 * np.pi * (200 * t + 500 * t * t))).astype(np.float32)


def encode(samples: np.ndarray, format: str, subtype: str | None = None, rate: int = RATE, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype, **options)
    return buffer.getvalue()


def decode(encoded: bytes) -> np.ndarray:
    recording = Recording(encoded, "record")
    samples = recording.decode()
    assert len(samples) == recording.samples
    return samples


def refused(encoded: bytes, reason: str = "corrupt audio", detail: str = "") -> None:
    with pytest.raises(BadRecord, match="^record: ") as caught:
        decode(encoded)
    assert caught.value.reason == reason and detail in caught.value.detail and "\n" not in str(caught.value)


# --- containers that state the size of their samples ------------------------------------------------------------------

FORMATS = ["WAV", "WAVEX", "RIFX", "RF64", "W64", "AIFF", "CAF", "AU", "NIST"]
SUBTYPES = [
    (format, subtype)
    for format in FORMATS
    for subtype in soundfile.available_subtypes("WAV" if format == "RIFX" else format)
    if not re.search("GSM|DWVW|G72|NMS|MP3|MPEG|ALAC", subtype) and (format, subtype) != ("RIFX", "MS_ADPCM")
]


def container(format: str, subtype: str = "PCM_16", samples: np.ndarray | None = None) -> bytes:
    samples = voice() if samples is None else samples
    if format == "RIFX":
        return encode(samples, "WAV", subtype, endian="BIG")
    return encode(samples, format, subtype)


@pytest.mark.parametrize("format, subtype", SUBTYPES)
def test_a_complete_file_loads_and_a_truncated_one_is_refused(format, subtype):
    samples = voice()
    encoded = container(format, subtype, samples)
    decoded = decode(encoded)
    blocks = "ADPCM" in subtype
    assert len(decoded) == len(samples) or blocks and 0 <= len(decoded) - len(samples) < 1024
    np.testing.assert_allclose(decoded[100:3900], samples[100:3900], atol=0.1 if blocks else 0.02)
    for cut in (1, 2, len(encoded) // 3, len(encoded) // 2):
        refused(encoded[:-cut], detail="truncated")


def test_a_file_that_ends_in_its_header_is_refused():
    for format in FORMATS:
        for length in (13, 30, 42):
            with pytest.raises(BadRecord, match="corrupt audio|unknown audio format"):
                decode(container(format)[:length])


@pytest.mark.parametrize("format", ["AVR", "SVX", "MAT4", "MAT5", "PAF", "PVF", "IRCAM", "VOC", "WVE", "MPC2K", "HTK"])
def test_formats_whose_end_cannot_be_judged_are_refused(format):
    encoded = encode(voice(), format, soundfile.default_subtype(format))
    refused(encoded, "unknown audio format", "FLAC")
    refused(encoded[: len(encoded) // 2], "unknown audio format")


def put(encoded: bytes, at: int, value: int, width: int, order: str) -> bytes:
    return encoded[:at] + value.to_bytes(width, order) + encoded[at + width :]


def with_size(format: str, value: int) -> bytes:
    """A file of a format whose header states `value` bytes of samples."""
    encoded = container(format)
    if format == "AU":
        return put(encoded, 8, value, 4, "big" if encoded[:4] == b".snd" else "little")
    if format == "RF64":
        return put(encoded, encoded.index(b"ds64") + 16, value, 8, "little")
    if format == "CAF":
        return put(encoded, encoded.index(b"data") + 4, value, 8, "big")
    if format == "W64":
        return put(encoded, encoded.index(b"data") + 16, value, 8, "little")
    name = b"SSND" if format == "AIFF" else b"data"
    return put(encoded, encoded.index(name) + 4, value, 4, "big" if format in ("AIFF", "RIFX") else "little")


UNKNOWN = [0, 0x7F000000, 0x7FFFEFDC, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36]


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "NIST"])
def test_files_written_to_a_pipe_load_in_full(format):
    """Their header was written before the length was known."""
    sizes = [*UNKNOWN, 2**63 - 1, 2**64 - 1] if format in ("RF64", "CAF", "W64") else UNKNOWN
    for size in sizes:
        np.testing.assert_array_equal(decode(with_size(format, size)), decode(container(format)))


@pytest.mark.parametrize("format", ["WAV", "RIFX", "AIFF", "RF64"])
def test_the_size_of_the_whole_file_does_not_matter(format):
    encoded = container(format)
    order = "big" if format in ("RIFX", "AIFF") else "little"
    right = len(encoded) - 8
    for size in (0, 8, 36, right - 8, right + 8, right // 2, right * 2, *UNKNOWN):
        np.testing.assert_array_equal(decode(put(encoded, 4, size, 4, order)), decode(encoded))
        refused(put(encoded, 4, size, 4, order)[:-2], detail="truncated")


def test_sizes_that_sox_writes_to_a_pipe():
    """WAV: 0x7ffff000 bytes of samples and 36 more. AIFF: 0x7f000000 bytes, and as many frames of two bytes."""
    expected = decode(container("WAV"))
    wav = put(with_size("WAV", 0x7FFFF000), 4, 0x7FFFF024, 4, "little")
    np.testing.assert_array_equal(decode(wav), expected)
    aiff = put(with_size("AIFF", 0x7F000008), 4, 0x7F00002E, 4, "big")
    np.testing.assert_array_equal(decode(put(aiff, aiff.index(b"COMM") + 10, 0x3F800000, 4, "big")), expected)


@pytest.mark.parametrize("format", ["WAV", "RIFX", "AIFF"])
def test_an_odd_number_of_bytes_needs_no_padding(format):
    samples = voice(3_999)
    encoded = container(format, "PCM_U8", samples)
    if format == "AIFF":  # libsndfile counts the padding
        encoded = put(encoded, encoded.index(b"SSND") + 4, 8 + 3_999, 4, "big")
    data = encoded.index(b"SSND" if format == "AIFF" else b"data") + (16 if format == "AIFF" else 8)
    np.testing.assert_allclose(decode(encoded[: data + 3_999]), samples, atol=0.02)
    refused(encoded[: data + 3_998], detail="truncated")


def test_chunks_behind_the_samples_are_no_samples():
    for format, chunk in (("WAV", LIST), ("W64", LIST.ljust(16, b"\0") + struct.pack("<Q", 32) + bytes(8))):
        np.testing.assert_array_equal(decode(container(format) + chunk), decode(container(format)))
    refused(container("WAV")[:-100] + LIST, detail="truncated")


def test_no_samples_are_told_from_unknown_ones():
    empty = container("WAV", samples=np.zeros(0, np.float32))
    for tail in (b"", LIST, LIST + LIST):
        assert len(decode(empty + tail)) == 0
    silence = with_size("WAV", 0)
    silence = silence[:44] + bytes(len(silence) - 44)
    np.testing.assert_array_equal(decode(silence), np.zeros(4_000))


def test_a_size_beyond_the_file_is_no_stream():
    right = 8_000
    for size in (right + 2, right * 2, 10**9):
        refused(with_size("WAV", size), detail=f"{right} of the {size} bytes")


@pytest.mark.parametrize("format", FORMATS)
def test_files_joined_to_one(format):
    first, second = voice(1_000), voice(3_000)[::-1]
    joined = container(format, samples=first) + container(format, samples=second)
    np.testing.assert_allclose(decode(joined), np.concatenate([first, second]), atol=1e-4)
    refused(joined[:-500], detail="truncated")


def test_compressed_sphere_files_are_left_to_libsndfile():
    encoded = container("NIST")
    coded = encoded.replace(b"pcm\n", b"pcm,embedded-shorten-v2.00\n", 1)[: len(encoded) // 2]
    with pytest.raises(BadRecord) as caught:
        decode(coded)
    assert "truncated" not in caught.value.detail


@given(st.sampled_from(FORMATS), st.integers(0, 120), st.integers(0, 255))
def test_a_damaged_header_raises_nothing_else(format, at, value):
    encoded = bytearray(container(format, samples=voice(200)))
    encoded[at] = value
    try:
        recording = Recording(bytes(encoded), "record")
        if recording.samples < 10_000:
            recording.decode()
    except BadRecord:
        pass


# --- MP3 --------------------------------------------------------------------------------------------------------------


def mp3(samples: np.ndarray, rate: int = 44_100, mode: str = "VARIABLE") -> bytes:
    return encode(samples, "MP3", rate=rate, bitrate_mode=mode, compression_level=0.5)


def untagged(encoded: bytes) -> bytes:
    """Without the first frame, which states the length: its body is zeros, so that the next header is easy to find."""
    return encoded[encoded.index(encoded[:2], 4) :]


def contains(decoded: np.ndarray, expected: np.ndarray) -> bool:
    """Whether `expected` stands somewhere in `decoded`."""
    delay = scipy.signal.correlate(decoded, expected, mode="valid").argmax()
    return np.allclose(decoded[delay : delay + len(expected)], expected, atol=1e-3)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate, channels", [(44_100, 1), (44_100, 2), (22_050, 2), (8_000, 1)])
def test_mp3_without_a_stated_length_loads_in_full(mode, rate, channels):
    """The length is the encoder's number of frames: the signal, and at most three frames of delay and padding."""
    quiet_first = voice(rate, rate) * np.linspace(0, 1, rate, dtype=np.float32) ** 4  # the estimates are then far off
    samples = np.stack([quiet_first] * channels, axis=1)
    tagged = decode(mp3(samples, rate, mode))
    assert len(tagged) == rate
    decoded = decode(untagged(mp3(samples, rate, mode)))
    frame = 1152 if rate > 24_000 else 576
    assert rate <= len(decoded) <= rate + 3 * frame and (len(decoded) + 529) % frame == 0
    assert contains(decoded, tagged[1000:-1000])


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_a_truncated_mp3_is_refused(mode):
    encoded = mp3(voice(44_100, 44_100), mode=mode)
    for cut in (1, 40, len(encoded) // 2, len(encoded) * 3 // 4):
        refused(encoded[:-cut], detail="truncated")
    for cut in (1, 40):  # frames that are missing as a whole leave no trace where no length is stated
        refused(untagged(encoded)[:-cut], detail="truncated")
    plain = untagged(encoded)
    last = plain.rindex(plain[:2])
    refused(plain[: last + 2], detail="truncated")
    assert len(decode(plain[:last])) < len(decode(plain))


ID3 = b"ID3\4\0\0\0\0\1\5" + b"TIT2" + bytes(129)  # 10 + 133 bytes
ID3_V1 = b"TAG" + b"a title" + bytes(118)
APE = b"APETAGEX" + struct.pack("<IIII8x", 2000, 32, 0, 0)


@pytest.mark.parametrize("before, after", [(ID3, b""), (b"", ID3_V1), (ID3, APE + ID3_V1), (bytes(10), bytes(1000))])
@pytest.mark.parametrize("tagged", [False, True])
def test_tags_and_zeros_around_an_mp3(before, after, tagged):
    plain = mp3(voice(22_050, 44_100))
    plain = plain if tagged else untagged(plain)
    np.testing.assert_array_equal(decode(before + plain + after), decode(plain))


def test_an_id3_tag_before_other_formats():
    for encoded in (container("WAV"), encode(voice(), "FLAC"), encode(voice(), "OGG")):
        np.testing.assert_array_equal(decode(ID3 + encoded), decode(encoded))
    refused(ID3 + b"no recording", detail="ID3")


@pytest.mark.parametrize("between", [b"", ID3_V1, ID3, ID3_V1 + ID3])
def test_mp3_files_joined_to_one(between):
    first, second = mp3(voice(22_050, 44_100)), mp3(voice(30_000, 44_100)[::-1])
    expected = np.concatenate([decode(first), decode(second)])
    assert len(expected) == 52_050
    np.testing.assert_array_equal(decode(first + between + second), expected)
    whole = decode(untagged(first) + between + untagged(second))
    assert contains(whole, decode(first)[1000:-1000]) and contains(whole, decode(second)[1000:-1000])
    assert 52_050 <= len(whole) <= 52_050 + 6 * 1152
    refused(first + between + second[:-200], detail="truncated")


def test_a_tag_that_states_too_few_frames():
    """As where frames were appended: all are read. A tag may also count its own frame."""
    encoded = mp3(voice(44_100, 44_100))
    at = encoded.index(b"Xing") + 8
    (frames,) = struct.unpack_from(">I", encoded, at)
    assert len(decode(put(encoded, at, frames // 2, 4, "big"))) == frames * 1152 - 529
    assert len(decode(put(encoded, at, frames + 1, 4, "big"))) == frames * 1152 - 529
    refused(put(encoded, at, frames + 2, 4, "big"), detail=f"{frames} of the {frames + 2} frames")


def test_joined_mp3_files_of_different_rates_are_refused():
    refused(mp3(voice()) + mp3(voice(), RATE), "wrong rate", "8000")


def test_damage_between_the_frames_of_an_mp3_is_refused():
    plain = untagged(mp3(voice(44_100, 44_100)))
    middle = plain.index(plain[:2], len(plain) // 2)
    refused(plain[:middle] + b"some text" + plain[middle:], detail="damaged")
    refused(plain[:middle] + b"\0" + plain[middle + 1 :], detail="damaged")
    np.testing.assert_array_equal(decode(plain + b"some text"), decode(plain))


def test_a_vbri_tag_states_the_length():
    encoded = mp3(voice(44_100, 44_100))
    plain = untagged(encoded)
    count = round((len(decode(plain)) + 529) / 1152)
    start = encoded[: len(encoded) - len(plain)]
    for stated in (count, count + 5):
        tag = start[:4] + bytes(32) + struct.pack(">4sHHHII", b"VBRI", 1, 0, 0, len(encoded), stated)
        tag = tag.ljust(len(start), b"\0") + plain
        if stated == count:
            np.testing.assert_array_equal(decode(tag), decode(plain))
        else:
            refused(tag, detail="truncated")


@pytest.mark.parametrize(
    "header, size, samples",
    [(b"\xff\xfd\x84\x00", 384, 1152), (b"\xff\xfd\x80\x00", 417, 1152), (b"\xff\xff\x84\x00", 256, 384)],
)
def test_layers_one_and_two_have_the_length_of_their_frames(header, size, samples):
    """Frames of silence: nothing but zeros follows the header. 44.1 kHz frames have no whole number of bytes."""
    assert len(decode(header.ljust(size, b"\0") * 30)) == 30 * samples
    refused((header.ljust(size, b"\0") * 30)[:-9], detail="truncated")


# --- Ogg --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_chained_ogg_loads_in_full_and_a_truncated_one_is_refused(subtype):
    links = [encode(voice(n, RATE), "OGG", subtype) for n in (30_000, 12_000)]
    expected = [decode(link) for link in links]
    assert [len(samples) for samples in expected] == [30_000, 12_000]
    chain = b"".join(links)
    np.testing.assert_array_equal(decode(chain), np.concatenate(expected))
    np.testing.assert_array_equal(decode(chain + b"a tag"), np.concatenate(expected))
    for encoded in (links[0], chain):
        last = encoded.rindex(b"OggS")
        for length in (len(encoded) - 1, len(encoded) // 2, last, last + 10, last + 27):
            refused(encoded[:length], detail="truncated")


def test_a_missing_page_of_an_ogg_is_refused():
    encoded = encode(voice(160_000), "OGG")
    pages = [match.start() for match in re.finditer(b"OggS", encoded)]
    assert len(pages) > 4
    refused(encoded[: pages[3]] + encoded[pages[4] :])
    refused(encoded[: pages[3]] + encoded[pages[3] + 5 :], detail="damaged")


# --- FLAC -------------------------------------------------------------------------------------------------------------


def piped(encoded: bytes) -> bytes:
    """Without its length and checksum in the header, as an encoder writes it to a pipe."""
    return encoded[:21] + bytes([encoded[21] & 0xF0]) + bytes(20) + encoded[42:]


@pytest.mark.parametrize("rate", [8_000, 8_001, 44_100, 65_000])
@pytest.mark.parametrize("samples", [10, 4_096, 60_001])
@pytest.mark.parametrize("channels, subtype", [(1, "PCM_16"), (2, "PCM_24"), (3, "PCM_S8")])
def test_flac_of_unknown_length_loads_in_full(rate, samples, channels, subtype):
    signal = np.stack([voice(samples)] * channels, axis=1)
    encoded = encode(signal, "FLAC", subtype, rate)
    decoded = decode(piped(encoded))
    assert len(decoded) == samples
    np.testing.assert_array_equal(decoded, decode(encoded))
    for cut in (1, 2, 9, len(encoded) // 20):
        refused(piped(encoded)[:-cut])
    refused(piped(encoded)[:42])


def test_flac_files_joined_to_one():
    first, second = encode(voice(5_000), "FLAC"), encode(voice(9_000)[::-1], "FLAC")
    expected = np.concatenate([voice(5_000), voice(9_000)[::-1]])
    for joined in (first + second, piped(first) + piped(second), first + piped(second)):
        np.testing.assert_allclose(decode(joined), expected, atol=1e-4)
        refused(joined[:-5])


STREAMS = [untagged(mp3(voice(5_000))), encode(voice(), "OGG"), piped(encode(voice(), "FLAC"))]


@given(st.sampled_from(STREAMS), st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_stream_raises_nothing_else(encoded, at, change):
    damaged = bytearray(encoded)
    damaged[at % len(damaged)] ^= change
    try:
        recording = Recording(bytes(damaged), "record")
        if recording.samples < 100_000:
            recording.decode()
    except BadRecord:
        pass


# --- channels ---------------------------------------------------------------------------------------------------------


def test_channels_of_opposite_phase_do_not_cancel():
    loud = voice()
    for quiet in (loud, 0.9 * loud, loud + 0.03 * np.random.default_rng(0).standard_normal(len(loud), np.float32)):
        stereo = np.stack([-0.9 * quiet, loud], axis=1)
        np.testing.assert_allclose(decode(encode(stereo, "WAV", "FLOAT")), loud, atol=1e-6)
    np.testing.assert_array_equal(down_mix(np.stack([loud, -loud], axis=1)), loud)


def test_other_channels_are_averaged():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4_000)).astype(np.float32)
    for stereo in ([a, a], [a, b], [a, 0 * a], [a + b, a - b], [0 * a, 0 * a], [a] * 3, [a] + [0 * a] * 15):
        channels = np.stack(stereo, axis=1)
        np.testing.assert_array_equal(down_mix(channels), channels.mean(axis=1))
    independent = rng.standard_normal((50_000, 16)).astype(np.float32)
    np.testing.assert_array_equal(down_mix(independent), independent.mean(axis=1))
