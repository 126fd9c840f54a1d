"""FLAC (RFC 9639): concatenated files, and files written to a pipe, whose header does not state their length."""

import functools
import re

from polygpt.data.media.containers.part import Incomplete, Part

MAGIC = b"fLaC"
_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
"""The magic and the header of STREAMINFO, a block of 34 bytes."""
_SAMPLES = (1 << 36) - 1
"""The bits of STREAMINFO that state the number of samples per channel, at the end of bytes 18 to 26 of a file."""


def recognises(encoded: bytes) -> bool:
    return encoded.startswith(MAGIC)


def parts(encoded: bytes) -> list[Part]:
    """The recordings of a file that `recognises` accepts, in order.

    Raises:
        Incomplete: if a file that does not state its length lacks its end. libsndfile detects the other cases.
    """
    starts = [match.start() for match in _START.finditer(encoded)] or [0]
    return [Part(_with_length(encoded[a:b])) for a, b in zip(starts, [*starts[1:], len(encoded)], strict=True)]


def _with_length(encoded: bytes) -> bytes:
    """A file with its length in the header. RFC 9639, section 8.2."""
    info = int.from_bytes(encoded[18:26], "big")
    if len(encoded) < 42 or info & _SAMPLES:
        return encoded
    block = int.from_bytes(encoded[10:12], "big")
    channels, bits = (info >> 41 & 7) + 1, (info >> 36 & 31) + 1
    longest = int.from_bytes(encoded[15:18], "big") or block * channels * (bits + 1) // 8 + 64
    first = _first_frame(encoded)
    at = len(encoded)
    while (at := encoded.rfind(b"\xff", max(first, len(encoded) - longest), at)) >= 0:
        stop = _frame_stop(encoded, at, block)
        if stop is not None and _crc(encoded[at:], 16, 0x8005) == 0:
            return encoded[:18] + (info | stop & _SAMPLES).to_bytes(8, "big") + encoded[26:]
    raise Incomplete("truncated: its last frame is incomplete")


def _first_frame(encoded: bytes) -> int:
    """Offset of the first frame, after the metadata."""
    at, last = 4, False
    while not last and at + 4 <= len(encoded):
        last = encoded[at] >= 0x80
        at += 4 + int.from_bytes(encoded[at + 1 : at + 4], "big")
    return min(at, len(encoded))


def _frame_stop(encoded: bytes, at: int, block: int) -> int | None:
    """The number of the sample that follows a frame, or None if no frame starts here. RFC 9639, section 9.1.

    Args:
        block: samples per frame, for streams that number frames instead of samples.
    """
    head = encoded[at : at + 16].ljust(16, b"\0")
    size_code, rate_code = head[2] >> 4, head[2] & 15
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # of the number, coded as UTF-8 extended to seven bytes
    if head[1] not in (0xF8, 0xF9) or size_code == 0 or rate_code == 15 or ones in (1, 8):
        return None
    number = head[4] & (0x7F >> ones)
    next_byte = 5 + max(0, ones - 1)
    for byte in head[5:next_byte]:
        number = number << 6 | byte & 0x3F
    if size_code in (6, 7):
        width = size_code - 5
        size = int.from_bytes(head[next_byte : next_byte + width], "big") + 1
        next_byte += width
    else:
        size = 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
    next_byte += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if _crc(head[:next_byte], 8, 0x07) != head[next_byte]:
        return None
    return (number if head[1] == 0xF9 else number * block) + size


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    table, crc, mask = _table(bits, polynomial), 0, (1 << bits) - 1
    for byte in data:
        crc = (crc << 8 & mask) ^ table[crc >> (bits - 8) ^ byte]
    return crc


@functools.cache
def _table(bits: int, polynomial: int) -> list[int]:
    """Checksums of single bytes, most significant bit first."""
    table = []
    for byte in range(256):
        crc = byte << (bits - 8)
        for _ in range(8):
            crc = crc << 1 ^ (polynomial if crc >> (bits - 1) else 0)
            crc &= (1 << bits) - 1
        table.append(crc)
    return table
