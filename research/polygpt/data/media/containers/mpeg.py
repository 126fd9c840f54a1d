"""MPEG audio, "MP3" (ISO 11172-3 and 13818-3): determines the true length from the frames.

A file is a sequence of frames and states its length only if the first frame carries a Xing, Info or VBRI tag. Without
one, decoders estimate the length from the size of the file and of the first frame, and stop there. This module counts
the frames and prepends a tag with their number.
"""

import struct
from typing import NamedTuple

from polygpt.data.media.containers.part import Incomplete, Part

# kbit/s by index. MPEG-1, layers I to III, then MPEG-2 and 2.5, layer I and layers II and III.
_ONE_I = tuple(range(32, 449, 32))
_ONE_II = (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_ONE_III = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_TWO_I = (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_TWO_II = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
BITRATES = {(1, 1): _ONE_I, (1, 2): _ONE_II, (1, 3): _ONE_III, (2, 1): _TWO_I, (2, 2): _TWO_II, (2, 3): _TWO_II}
RATES = (44_100, 48_000, 32_000)
VERSIONS = {3: (1, 1), 2: (2, 2), 0: (2, 4)}
"""By header bits: the table of bit rates, and the divisor of the sample rate (MPEG-1, 2, 2.5)."""


class Frame(NamedTuple):
    at: int
    size: int
    samples: int
    """Per channel."""
    layer: int
    family: int
    """1 for MPEG-1, 2 for MPEG-2 and 2.5."""
    form: tuple[int, int, bool]
    """Layer, sample rate, whether mono: the same in all frames of a recording."""


class Tag(NamedTuple):
    """The contents of a Xing, Info or VBRI tag."""

    frames: int | None
    size: int | None
    """Bytes, including the frame of the tag."""
    read: bool = True
    """Whether libsndfile's decoder reads it."""


def recognises(encoded: bytes) -> bool:
    """Whether there are two frames, or one that fills the file. Zeros before them are skipped."""
    first = _frame(encoded, at := len(encoded) - len(encoded.lstrip(b"\0")))
    return first is not None and (at + first.size == len(encoded) or _frame(encoded, at + first.size) is not None)


def parts(encoded: bytes) -> list[Part]:
    """The recordings of a file that `recognises` accepts, in order.

    Raises:
        Incomplete: if frames are missing or damaged.
    """
    runs: list[list[Frame]] = []
    at = 0
    while at < len(encoded):
        frame = _frame(encoded, at)
        if frame is None:
            tag = _tag_size(encoded, at)
            if not tag:
                break
            at += tag
            continue
        if at + frame.size > len(encoded):
            raise Incomplete(f"truncated: its last frame has {len(encoded) - at} of {frame.size} bytes")
        if not runs or runs[-1][0].form != frame.form or _tag(encoded, frame) is not None:
            runs.append([])
        runs[-1].append(frame)
        at += frame.size
    if at < len(encoded):
        _check_rest(encoded, at, runs[-1][-1])
    return [_part(encoded, run) for run in runs]


def _frame(encoded: bytes, at: int) -> Frame | None:
    """The frame whose header is at an offset, if one is. ISO 11172-3, section 2.4.1.3."""
    if at + 4 > len(encoded):
        return None
    a, b, c, d = encoded[at : at + 4]
    layer, version = 4 - (b >> 1 & 3), VERSIONS.get(b >> 3 & 3)
    bitrate, rate, padding = c >> 4, c >> 2 & 3, c >> 1 & 1
    if a != 0xFF or b < 0xE0 or version is None or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    family, divisor = version
    rate = RATES[rate] // divisor
    bits = BITRATES[family, layer][bitrate - 1] * 1000
    samples = 384 if layer == 1 else 576 if layer == 3 and family == 2 else 1152
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    return Frame(at, size, samples, layer, family, (layer, rate, d >> 6 == 3))


def _side(frame: Frame) -> int:
    """Offset of the audio data in a layer III frame, after header and side information; tags are stored there."""
    mono = frame.form[2]
    return 4 + ((17 if mono else 32) if frame.family == 1 else (9 if mono else 17))


def _tag(encoded: bytes, frame: Frame) -> Tag | None:
    """The tag that a frame carries instead of audio, if it does."""
    data = encoded[frame.at : frame.at + frame.size]
    for at in (_side(frame), _side(frame) + 2):  # the latter if there is a checksum
        if frame.layer == 3 and data[at : at + 4] in (b"Xing", b"Info") and at + 16 <= len(data):
            flags, first, second = struct.unpack_from(">III", data, at + 4)
            values = [first, second] if flags & 1 else [None, first]
            return Tag(values[0], values[1] if flags & 2 else None)
    if frame.layer == 3 and data[36:40] == b"VBRI" and len(data) >= 54:
        size, frames = struct.unpack_from(">II", data, 46)
        return Tag(frames, size, read=False)
    return None


def _tag_size(encoded: bytes, at: int) -> int:
    """Bytes of another kind of tag, or of zeros, at an offset: both may occur between and after recordings."""
    if encoded.startswith(b"ID3", at):
        return id3_size(encoded, at)
    if encoded.startswith(b"TAG", at):
        return 128
    if encoded.startswith(b"APETAGEX", at):
        return 32 + int.from_bytes(encoded[at + 12 : at + 16], "little")
    end = at
    while end < len(encoded) and encoded[end] == 0:
        end += 1
    return end - at


def id3_size(encoded: bytes, at: int = 0) -> int:
    """Bytes of an ID3v2 tag at an offset (id3.org, ID3v2.4, section 3.1); 0 if there is none."""
    if not encoded.startswith(b"ID3", at) or at + 10 > len(encoded):
        return 0
    size = 0
    for byte in encoded[at + 6 : at + 10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if encoded[at + 5] & 0x10 else 0)


def _check_rest(encoded: bytes, at: int, last: Frame) -> None:
    """Raises Incomplete if the rest of the file hides more frames, or is the beginning of one."""
    if len(encoded) - at < 4 and encoded[at] == 0xFF:
        raise Incomplete("truncated: its last frame has no complete header")
    search = at
    while (search := encoded.find(b"\xff", search + 1)) >= 0:
        frame = _frame(encoded, search)
        following = frame and _frame(encoded, search + frame.size)
        if following and frame.form == following.form == last.form:
            raise Incomplete(f"damaged: {search - at} bytes at byte {at} are no frame")


def _part(encoded: bytes, run: list[Frame]) -> Part:
    tag = _tag(encoded, run[0])
    data = b"".join(encoded[frame.at : frame.at + frame.size] for frame in run)
    frames = run if tag is None else run[1:]
    if tag is not None and tag.frames is not None:
        if tag.frames == len(frames) and tag.read:
            return Part(data)
        counts_itself = tag.frames == len(run) and tag.size == len(data)
        if tag.frames > len(frames) and not counts_itself:
            raise Incomplete(f"truncated: {len(frames)} of the {tag.frames} frames that it states")
    if tag is not None:
        data = data[run[0].size :]
    if not frames:
        return Part(data)
    header = bytearray(encoded[run[0].at : run[0].at + 4])
    header[1] |= 1  # without a checksum
    if run[0].layer != 3:  # no tag exists; appended silent frames raise the estimate, and are cut off after decoding
        silence = bytes(header).ljust(_frame(bytes(header), 0).size, b"\0")
        return Part(data + 2 * silence, sum(frame.samples for frame in frames))
    header[2] = 0xE0 | header[2] & 0x0D  # the highest bit rate, so that the tag fits
    size = _frame(bytes(header), 0).size
    tag_frame = bytes(header).ljust(_side(run[0]), b"\0") + b"Xing" + struct.pack(">II", 1, len(frames))
    return Part(tag_frame.ljust(size, b"\0") + data)
