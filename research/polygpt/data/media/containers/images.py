"""Reduces image files to their pixel data, plus the orientation that the camera recorded.

Image decoders also parse texts, colour profiles and EXIF, and reject the whole file if any of them is damaged. Dropping
such metadata before decoding ensures that it never causes intact pixels to be rejected. Only the orientation is kept; a
damaged one counts as upright. Colour profiles are never applied, so dropping them changes no pixel.
"""

import re
import struct
import zlib
from operator import ne

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
XMP = b"XML:com.adobe.xmp"
"""Keyword of the PNG text that contains XMP."""
RAW_EXIF = b"Raw profile type exif"
"""Keyword of the PNG text in which ImageMagick stores EXIF."""
WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04
"""Bits of a VP8X chunk that announce ICC, EXIF and XMP chunks."""
MOST_TEXT = 1 << 20
"""Maximum number of bytes to decompress from a PNG text."""


def without_metadata(encoded: bytes) -> tuple[bytes, int]:
    """Drops the metadata of a PNG, JPEG or WebP file; other formats are returned unchanged.

    Damaged pixel data is left as is, for the decoder to detect.

    Returns:
        (file without metadata, EXIF orientation 1..8). 1 is upright.
    """
    for magic, split in ((PNG, _png), (b"\xff\xd8", _jpeg), (b"RIFF", _webp)):
        if encoded.startswith(magic):
            kept, exif, xmp = split(encoded)
            return kept, _orientation(exif, xmp)
    return encoded, 1


def _png(encoded: bytes) -> tuple[bytes, bytes, bytes]:
    """(file without metadata, EXIF, XMP). PNG specification, third edition, section 5."""
    kept, exif, texts, at = [PNG], b"", {}, len(PNG)
    while at + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        body = encoded[at + 8 : at + 8 + length]
        # A name that differs in one byte may be a damaged name of a pixel chunk. The decoder's checksum decides.
        if any(sum(map(ne, kind, pixels)) <= 1 for pixels in PNG_PIXELS):
            kept.append(encoded[at : at + 12 + length])
        elif kind == b"eXIf":
            exif = body
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, text = _png_text(kind, body)
            texts[keyword] = text
        at += 12 + length
    if not exif and RAW_EXIF in texts:
        try:  # three lines of description, then hexadecimal digits
            exif = bytes.fromhex(b"".join(texts[RAW_EXIF].split(b"\n")[3:]).decode("latin-1"))
        except ValueError:
            exif = b""
    return b"".join(kept), exif, texts.get(XMP, b"")


def _png_text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """(keyword, text) of a text chunk. Compressed text is read only where it may state an orientation."""
    keyword, _, text = body.partition(b"\0")
    compressed = kind == b"zTXt"
    if compressed:
        text = text[1:]
    elif kind == b"iTXt":
        compressed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
    if compressed and keyword in (XMP, RAW_EXIF):
        try:
            text = zlib.decompressobj().decompress(text, MOST_TEXT)
        except zlib.error:
            text = b""
    return keyword, text


def _jpeg(encoded: bytes) -> tuple[bytes, bytes, bytes]:
    """(file without metadata, EXIF, XMP). ITU-T T.81, annex B; everything from the first scan on is kept."""
    kept, exif, xmp, at = [encoded[:2]], b"", b"", 2
    while 0 <= (at := encoded.find(b"\xff", at)) <= len(encoded) - 4:  # decoders skip bytes between segments
        marker, size = struct.unpack_from(">xBH", encoded, at)
        if marker == 0xDA:
            break
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD9:  # no segment follows
            at += 1
            continue
        segment, body = encoded[at : at + 2 + size], encoded[at + 4 : at + 2 + size]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
        # JFIF and Adobe segments say how the components encode colour. libjpeg ignores shorter ones.
        jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        if jfif or adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        at += 2 + size
    return b"".join(kept) + encoded[at:] if at >= 0 else b"".join(kept), exif, xmp


def _webp(encoded: bytes) -> tuple[bytes, bytes, bytes]:
    """(file without metadata, EXIF, XMP). RFC 9649, section 2."""
    if encoded[8:12] != b"WEBP":
        return encoded, b"", b""
    kept, found, at = [], {}, 12
    while at + 8 <= len(encoded):
        kind, size = struct.unpack_from("<4sI", encoded, at)
        end = at + 8 + size + size % 2
        chunk = encoded[at:end]
        if kind == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~WEBP_METADATA_FLAGS]) + chunk[9:]
        if kind in WEBP_PIXELS:
            kept.append(chunk)
        found[kind] = chunk[8 : 8 + size]
        at = end
    # The length that the chunks state, so that the decoder notices if the last one is truncated.
    stated = 4 + sum(8 + (size := struct.unpack_from("<4xI", chunk)[0]) + size % 2 for chunk in kept)
    header = struct.pack("<4sI4s", b"RIFF", stated, b"WEBP")
    return header + b"".join(kept), found.get(b"EXIF", b""), found.get(b"XMP ", b"")


def _orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation 1..8 that EXIF states, or else XMP; 1 if neither can be read. CIPA DC-008, section 4.6.2."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    value = None
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, at)
            if tag == 0x0112:
                form = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}[kind]
                (value,) = struct.unpack_from(order + form, exif, at + 8)
                break
    except (KeyError, struct.error):
        value = None
    if value is None and (stated := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        value = int(stated[1])
    return value if value in range(1, 9) else 1
