"""Damaged metadata never rejects intact pixels, and the recorded orientation is read wherever it is readable."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from polygpt.data.media.containers.images import without_metadata
from polygpt.data.media.image import ImageFeatures
from polygpt.errors import BadRecord

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
BOMB = zlib.compress(bytes(2_000_000), 9)
"""2 MB of text in 2 kB: more than Pillow accepts."""


def decode(encoded: bytes) -> np.ndarray:
    return ImageFeatures().decode(encoded, "record")


def encoded(format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """A TIFF header and one directory: the orientation, after a signed ratio that points outside."""
    entries = [struct.pack(order + "HHII", 0x010E, 10, 1, 9999)]
    value = struct.pack(order + {3: "Hxx", 4: "I"}[kind], orientation)
    entries.append(struct.pack(order + "HHI", 0x0112, kind, 1) + value)
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    return {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8) + directory


def xmp(orientation: int) -> bytes:
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


def png_with(*chunks: tuple[bytes, bytes], crc: int = 0, last: bool = False) -> bytes:
    """The image as PNG, with chunks after its header (or before its end) whose checksums are changed by `crc`."""
    data = encoded("PNG")
    at = data.index(b"IEND") - 4 if last else 33
    made = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ crc)
        for kind, body in chunks
    ]
    return data[:at] + b"".join(made) + data[at:]


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    data = encoded("JPEG")
    made = [b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(body)) + body for marker, body in segments]
    return data[:2] + b"".join(made) + data[2:]


def webp_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """The image as extended WebP. EXIF and XMP follow the pixels, the colour profile precedes them."""
    stream = encoded("WEBP", lossless=True)[12:]
    made = {kind: kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks}
    flags = sum({b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}.get(kind, 0) for kind in made)
    h, w = PIXELS.shape[:2]
    header = b"VP8X" + struct.pack("<IB3x", 10, flags) + (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little")
    profile = made.pop(b"ICCP", b"")
    body = b"WEBP" + header + profile + stream + b"".join(made.values())
    return b"RIFF" + struct.pack("<I", len(body)) + body


PLACES = {
    "PNG eXIf": lambda o: png_with((b"eXIf", exif(o))),
    "PNG eXIf after the pixels": lambda o: png_with((b"eXIf", exif(o, ">")), last=True),
    "PNG eXIf with a wrong checksum": lambda o: png_with((b"eXIf", exif(o)), crc=1),
    "PNG XMP": lambda o: png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(o))),
    "PNG compressed XMP": lambda o: png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(o)))),
    "PNG raw profile": lambda o: png_with(
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n    38\n" + exif(o).hex().encode() + b"\n"))
    ),
    "JPEG EXIF": lambda o: jpeg_with((0xE1, b"Exif\0\0" + exif(o))),
    "JPEG big-endian EXIF of 32 bits": lambda o: jpeg_with((0xE1, b"Exif\0\0" + exif(o, ">", kind=4))),
    "JPEG XMP": lambda o: jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(o))),
    "WebP EXIF": lambda o: webp_with((b"EXIF", exif(o))),
    "WebP EXIF with JPEG's prefix": lambda o: webp_with((b"EXIF", b"Exif\0\0" + exif(o))),
    "WebP XMP": lambda o: webp_with((b"XMP ", xmp(o))),
}


@pytest.mark.parametrize("place", PLACES)
def test_orientation_is_applied_wherever_it_stands(place):
    """0 and 9 are not defined and count as upright."""
    plain = decode(PLACES[place](1))
    for orientation in range(10):
        image = Image.fromarray(plain)
        image.getexif()[0x0112] = orientation
        np.testing.assert_array_equal(decode(PLACES[place](orientation)), ImageOps.exif_transpose(image))


def test_exif_takes_precedence_over_xmp_and_xmp_stands_in_for_damaged_exif():
    other = (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(3))
    assert decode(jpeg_with(other, (0xE1, b"Exif\0\0" + exif(6)))).shape[:2] == (7, 5)
    turned = decode(jpeg_with(other, (0xE1, b"Exif\0\0nonsense")))
    np.testing.assert_array_equal(turned, decode(encoded("JPEG"))[::-1, ::-1])


TEXT = [
    b"Comment\0" + bytes(range(256)),
    b"no separator",
    b"",
    b"XML:com.adobe.xmp\0\1",
    b"XML:com.adobe.xmp\0\1\0\0\0junk",
]
TEXT += [b"Raw profile type exif\0\0nonsense", b"Raw profile type exif\0\n1\n2\n3\nzz"]
TEXT += [b"Comment\0\0" + BOMB, b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB, b"Raw profile type exif\0\0" + BOMB]


@pytest.mark.parametrize("last", [False, True], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("crc", [0, 1], ids=["right checksum", "wrong checksum"])
@pytest.mark.parametrize(
    "kind", "cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST pHYs sPLT tIME tEXt zTXt iTXt eXIf acTL fcTL".split()
)
def test_damaged_chunks_of_png_metadata(kind, crc, last):
    bodies = [b"", b"\0", b"nonsense"] + (TEXT if kind[1:] == "TXt" or kind == "tEXt" else [])
    if kind == "iCCP":
        bodies += [b"icc\0\0" + BOMB, b"icc\0\7junk"]
    for body in bodies:
        np.testing.assert_array_equal(decode(png_with((kind.encode(), body), crc=crc, last=last)), PIXELS)


APP = {0xE0: b"JFIF\0", 0xE1: b"Exif\0\0", 0xE2: b"ICC_PROFILE\0", 0xED: b"Photoshop 3.0\0008BIM", 0xEE: b"Adobe"}
JPEG_METADATA = [(marker, prefix + body) for marker, prefix in APP.items() for body in (b"", b"\1", b"junk")]
JPEG_METADATA += [
    (0xE2, b"MPF\0" + body) for body in (b"", b"nonsense", b"II*\0\x08\0\0\0\1\0\1\xb0\7\0\1\0\0\0\0\0\0\0")
]
JPEG_METADATA += [(marker, b"") for marker in range(0xE0, 0xF0)] + [(0xFE, b""), (0xFE, bytes(65_000))]


@pytest.mark.parametrize("segment", JPEG_METADATA, ids=lambda s: f"{s[0]:x} {s[1][:14]}")
def test_damaged_segments_of_jpeg_metadata(segment):
    np.testing.assert_array_equal(decode(jpeg_with(segment)), decode(encoded("JPEG")))


@pytest.mark.parametrize("kind", [b"ICCP", b"EXIF", b"XMP ", b"abcd"])
@pytest.mark.parametrize("body", [b"", b"\0", b"nonsense", b"MM\0*\xff\xff\xff\xff"])
def test_damaged_chunks_of_webp_metadata(kind, body):
    np.testing.assert_array_equal(decode(webp_with((kind, body))), PIXELS)


@pytest.mark.parametrize(
    "make", [lambda: webp_with((b"EXIF", bytes(500))), lambda: png_with((b"tEXt", bytes(500)), last=True)]
)
def test_a_file_cut_in_the_metadata_behind_its_pixels(make):
    np.testing.assert_array_equal(decode(make()[:-300]), PIXELS)


@pytest.mark.parametrize(
    "format, options", [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"lossless": False})]
)
def test_a_file_cut_in_its_pixels_is_refused(format, options):
    """The cut is found although the file is assembled anew without its metadata."""
    data = encoded(format, **options)
    for cut in {len(data) - 30, len(data) * 3 // 4}:
        with pytest.raises(BadRecord, match="corrupt image|unknown image format"):
            decode(data[:cut])


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
@pytest.mark.parametrize("at", range(4))
def test_a_damaged_name_of_a_pixel_chunk_is_refused(kind, at):
    data = bytearray(encoded("PNG"))
    data[data.index(kind) + at] ^= 0x20
    with pytest.raises(BadRecord):
        decode(bytes(data))


@pytest.mark.parametrize("name", [b"PLTE", b"tRNS"])
def test_a_damaged_name_of_a_palette_does_not_change_the_colours(name):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).quantize(16).save(buffer, "PNG", transparency=3)
    data = bytearray(buffer.getvalue())
    data[data.index(name)] ^= 0x20
    with pytest.raises(BadRecord):
        decode(bytes(data))


TURNED = [decode(PLACES["JPEG EXIF"](orientation)) for orientation in range(1, 9)]


@given(st.integers(0, 200), st.integers(1, 255))
def test_any_byte_of_exif_may_be_damaged(at, change):
    data = bytearray(PLACES["JPEG EXIF"](6))
    at = 12 + at % len(exif(6))
    data[at] ^= change
    raw = decode(bytes(data))
    assert any(raw.shape == turned.shape and (raw == turned).all() for turned in TURNED)


def test_an_adobe_segment_still_decides_how_colour_is_encoded():
    """Transform 0 says RGB. Without the segment, libjpeg would take the components for YCbCr."""
    plain = encoded("JPEG", subsampling=0)
    start = plain.index(b"\xff\xe0")
    size = struct.unpack_from(">H", plain, start + 2)[0]
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
    data = plain[:start] + adobe + plain[start + 2 + size :]
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    assert (expected != decode(plain)).any()


@pytest.mark.parametrize("format", ["GIF", "BMP"])
def test_other_formats_are_left_as_they_are(format):
    assert without_metadata(encoded(format)) == (encoded(format), 1)


def test_other_riff_files_are_left_as_they_are():
    assert without_metadata(b"RIFF\4\0\0\0AVI ") == (b"RIFF\4\0\0\0AVI ", 1)
