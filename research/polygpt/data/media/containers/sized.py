"""Containers that state the size of their samples: WAV (RIFF, RIFX, RF64), W64, AIFF, CAF, AU and NIST SPHERE.

libsndfile reads a truncated file as a shorter recording, so the stated size is compared with the bytes present. Only
the size of the samples counts: sizes of the whole file are often wrong in complete files, because browsers, pipes and
recorders write them before the length is known.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from polygpt.data.media.containers.part import Incomplete, Part

UNKNOWN = 0x7F000000
"""A size from here on that exceeds the file means "unknown": writers to pipes state 0x7f000000, 0x7ffff000, 2**32-1."""


@dataclasses.dataclass(frozen=True)
class Chunked:
    """A container made of chunks: a name, a size and a body each."""

    magic: bytes
    """The first bytes of a file."""
    forms: tuple[bytes, ...]
    """Bytes that may immediately precede the first chunk."""
    first: int
    """Offset of the first chunk."""
    samples: bytes
    """Name of the chunk that contains the samples."""
    order: Literal["little", "big"]
    """Byte order of sizes."""
    width: int = 4
    """Bytes per size."""
    counted: bool = False
    """Whether a size includes the chunk's name and size."""
    align: int = 2
    """Chunks start at multiples of this."""

    def recognises(self, encoded: bytes) -> bool:
        return encoded.startswith(self.magic) and encoded[: self.first].endswith(self.forms)


_W64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")
"""The tail of the GUIDs that name W64 chunks, except the outermost."""
CHUNKED = (
    Chunked(b"RIFF", (b"WAVE",), 12, b"data", "little"),
    Chunked(b"RIFX", (b"WAVE",), 12, b"data", "big"),
    Chunked(b"RF64", (b"WAVE",), 12, b"data", "little"),
    Chunked(b"FORM", (b"AIFF", b"AIFC"), 12, b"SSND", "big"),
    Chunked(b"caff", (b"",), 8, b"data", "big", width=8, align=1),
    Chunked(b"riff", (b"wave" + _W64,), 40, b"data" + _W64, "little", width=8, counted=True, align=8),
)
AU = {b".snd": "big", b"dns.": "little"}
"""Byte orders of AU files by their first bytes."""
NIST = b"NIST_1A\n"


class Samples(NamedTuple):
    """The location of the samples of the first recording in a file."""

    begin: int
    """Offset of their first byte."""
    size: int
    """Their number of bytes, as stated."""
    field: tuple[int, int, str] | None = None
    """Offset, bytes, and byte order of the size in the header."""
    overhead: int = 0
    """Bytes beyond the samples that the size in the header includes."""


class Chunk(NamedTuple):
    at: int
    name: bytes
    begin: int
    size: int
    stop: int
    """Offset of the next chunk."""


def recognises(encoded: bytes) -> bool:
    return encoded[:4] in AU or encoded.startswith(NIST) or any(kind.recognises(encoded) for kind in CHUNKED)


def parts(encoded: bytes) -> list[Part]:
    """The recordings of a file that `recognises` accepts, in order.

    Raises:
        Incomplete: if samples are missing.
    """
    found = []
    while encoded:
        first, encoded = _first(encoded)
        found.append(Part(first))
    return found


def _first(encoded: bytes) -> tuple[bytes, bytes]:
    """(the first recording, the bytes of any appended recordings)."""
    kind = next((kind for kind in CHUNKED if kind.recognises(encoded)), None)
    if kind is not None:
        samples = _chunked(encoded, kind)
    else:
        samples = _nist(encoded) if encoded.startswith(NIST) else _au(encoded)
    present = len(encoded) - samples.begin
    if samples.size > present and samples.size + samples.overhead < UNKNOWN:
        raise Incomplete(f"truncated: {max(0, present)} of the {samples.size} bytes of samples that it states")
    streamed = samples.size == 0 < present and not (kind and _only_chunks(encoded, samples.begin, kind))
    if samples.size > present or streamed:
        return _with_size(encoded, samples, present), b""
    end = stop = samples.begin + samples.size
    if kind is not None:
        chunks = _chunks(encoded, kind, end + -end % kind.align)
        stop = next((chunk.at for chunk in chunks if chunk.name.startswith(kind.magic)), len(encoded))
    if kind is None or kind.counted:  # in W64, AU and NIST, libsndfile reads everything up to the end as samples
        return encoded[:end], encoded[stop:] if recognises(encoded[stop:]) else b""
    return encoded[:stop], encoded[stop:] if recognises(encoded[stop:]) else b""


def _with_size(encoded: bytes, samples: Samples, size: int) -> bytes:
    """The file with the size of its samples in the header."""
    if samples.field is None:
        return encoded
    at, width, order = samples.field
    return encoded[:at] + (size + samples.overhead).to_bytes(width, order) + encoded[at + width :]


def _chunks(encoded: bytes, kind: Chunked, at: int) -> Iterator[Chunk]:
    """Chunks from an offset on, as long as their names are plausible."""
    head = len(kind.samples) + kind.width
    while at + head <= len(encoded) and encoded[at : at + 4].isascii() and encoded[at : at + 4].decode().isprintable():
        begin = at + head
        size = max(0, int.from_bytes(encoded[begin - kind.width : begin], kind.order) - kind.counted * head)
        stop = begin + size
        stop += -stop % kind.align
        yield Chunk(at, encoded[at : at + len(kind.samples)], begin, size, stop)
        at = stop


def _only_chunks(encoded: bytes, at: int, kind: Chunked) -> bool:
    """Whether only chunks follow: a stated sample size of 0 then means no samples, not an unknown size."""
    for chunk in _chunks(encoded, kind, at):
        at = chunk.stop
    return at in (len(encoded), len(encoded) + 1)


def _chunked(encoded: bytes, kind: Chunked) -> Samples:
    overhead = len(kind.samples) + kind.width if kind.counted else 0
    long = None
    for chunk in _chunks(encoded, kind, kind.first):
        if chunk.name == b"ds64" and chunk.begin + 16 <= len(encoded):
            long = chunk.begin + 8
        if chunk.name == kind.samples:
            if long is not None and chunk.size == 0xFFFFFFFF:  # RF64: the true size is in the ds64 chunk
                return Samples(chunk.begin, int.from_bytes(encoded[long : long + 8], "little"), (long, 8, "little"))
            field = (chunk.begin - kind.width, kind.width, kind.order)
            return Samples(chunk.begin, chunk.size, field, overhead)
    raise Incomplete(f"truncated before its samples: no {kind.samples[:4].decode()} chunk")


def _au(encoded: bytes) -> Samples:
    order = AU[encoded[:4]]
    begin, size = (int.from_bytes(encoded[at : at + 4], order) for at in (4, 8))
    return Samples(begin, size, (8, 4, order))


def _nist(encoded: bytes) -> Samples:
    """NIST SPHERE: a header of text lines "name -type value"."""
    lines = encoded[: encoded.find(b"end_head")]
    fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", lines, re.MULTILINE))
    try:
        begin = max(len(NIST), int(encoded.split(b"\n", 2)[1]))
        count, channels, width = (int(fields[name]) for name in (b"sample_count", b"channel_count", b"sample_n_bytes"))
    except (IndexError, KeyError, ValueError):
        raise Incomplete("its header does not state sample_count, channel_count and sample_n_bytes") from None
    if b"embedded" in fields.get(b"sample_coding", b""):  # compressed; libsndfile rejects it with a reason
        return Samples(begin, max(0, len(encoded) - begin))
    return Samples(begin, max(0, count * channels * width))
