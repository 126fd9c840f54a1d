"""Ogg (RFC 3533): chained files, and detection of missing pages at the end."""

import struct

from polygpt.data.media.containers.part import Incomplete, Part

MAGIC = b"OggS"
BEGINS, ENDS = 2, 4
"""Flags of the first and the last page of a stream."""


def recognises(encoded: bytes) -> bool:
    return encoded.startswith(MAGIC)


def parts(encoded: bytes) -> list[Part]:
    """The links of a chain, in order. libsndfile by itself reads only the first.

    Raises:
        Incomplete: if a page is truncated, or a stream lacks its last page.
    """
    starts, at, in_headers = [], 0, False
    ended: dict[int, bool] = {}  # by serial number of a stream, whether its last page was seen
    while at < len(encoded):
        if not encoded.startswith(MAGIC, at):
            if encoded.find(MAGIC, at) < 0:
                break  # a tag that another program appended
            raise Incomplete(f"damaged: no Ogg page at byte {at}")
        size, flags, serial = _page(encoded, at)
        if not starts or flags & BEGINS and not in_headers:
            _check_ends(ended)
            starts.append(at)
            ended = {}
        in_headers = bool(flags & BEGINS)
        ended[serial] = bool(flags & ENDS)
        at += size
    _check_ends(ended)
    stops = [*starts[1:], at]
    return [Part(encoded[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def _page(encoded: bytes, at: int) -> tuple[int, int, int]:
    """(bytes of the page, its flags, serial number of its stream). RFC 3533, section 6."""
    if at + 27 <= len(encoded):
        flags, serial, segments = struct.unpack_from("<5xB8xI8xB", encoded, at)
        head = 27 + segments
        size = head + sum(encoded[at + 27 : at + head])
        if at + head <= len(encoded) and at + size <= len(encoded):
            return size, flags, serial
    raise Incomplete("truncated in its last Ogg page")


def _check_ends(ended: dict[int, bool]) -> None:
    if not all(ended.values()):
        raise Incomplete("truncated: its last Ogg page is missing")
