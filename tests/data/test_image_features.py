"""Pictures: decoding, what is refused and how, resizing, normalising."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from polygpt.data.media.image import ImageFeatures, crop_box
from polygpt.errors import BadRecord, SpecError


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that states, and would unfold to, a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def test_png_decodes_to_its_pixels_from_bytes_and_path(tmp_path):
    pixels = noise(5, 7)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(pixels)))
    spec = ImageFeatures()
    np.testing.assert_array_equal(spec.decode(encoded(Image.fromarray(pixels)), "record"), pixels)
    np.testing.assert_array_equal(spec.decode(tmp_path / "a.png", "record"), pixels)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP", "GIF"])
def test_other_allowed_formats_decode(format):
    raw = ImageFeatures().decode(encoded(Image.new("RGB", (6, 4), (200, 30, 90)), format), "record")
    assert raw.shape == (4, 6, 3) and raw.dtype == np.uint8
    assert np.abs(raw.astype(int) - [200, 30, 90]).max() <= 8


def test_exif_orientation_is_applied():
    pixels = noise(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    raw = ImageFeatures().decode(encoded(Image.fromarray(pixels), exif=exif), "record")
    np.testing.assert_array_equal(raw, np.rot90(pixels, k=-1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(6, 4), (4, 4)])
def test_loading_equals_extraction_from_raw_samples(format, mode, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if format == "GIF" else {"exif": exif}
    source = encoded(Image.fromarray(noise(*size)).convert(mode), format, **options)
    spec = ImageFeatures(4, 4)
    (loaded, one), (extracted, _) = spec.load(source, "record"), spec.extract(spec.decode(source, "record"))
    np.testing.assert_array_equal(loaded, extracted)
    assert one == 1 and loaded.dtype == np.float32


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_colour_modes_become_rgb(mode):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    np.testing.assert_allclose(ImageFeatures().decode(encoded(image, format), "record"), 255, atol=1)


def test_sixteen_bit_grey_keeps_its_scale():
    image = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    raw = ImageFeatures().decode(encoded(image), "record")
    np.testing.assert_array_equal(raw[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        options = {"transparency": 0}
    else:
        image, options = image.convert(mode), {}
    raw = ImageFeatures(background=77).decode(encoded(image, **options), "record")
    np.testing.assert_array_equal(raw, np.full((4, 4, 3), 77))


@pytest.mark.parametrize(
    "source, reason",
    [
        (b"", "empty file"),
        (b"this is not a picture", "unknown image format"),
        (encoded(Image.fromarray(noise(40, 40)))[:-900], "corrupt image"),
        (encoded(Image.fromarray(noise(40, 40)), "JPEG")[:-300], "corrupt image"),
        (encoded(Image.fromarray(noise(8, 8)), "TIFF"), "unknown image format"),
        (bomb(60_000, 60_000), "too many pixels"),  # beyond twice Pillow's own limit: an error of Pillow
        (bomb(10_000, 10_000), "too many pixels"),  # beyond Pillow's limit: a warning of Pillow
        (bomb(8_000, 8_000), "too many pixels"),  # beyond ours alone
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_refused_by_name(source, reason):
    with pytest.raises(BadRecord, match=r"^captions\.jsonl, line 3: ") as caught:
        ImageFeatures().decode(source, "captions.jsonl, line 3")
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_record(tmp_path):
    with pytest.raises(BadRecord, match=r"^line 3: missing file$"):
        ImageFeatures().decode(tmp_path / "gone.png", "line 3")


@given(at=st.integers(8, 400), value=st.integers(0, 255))
def test_damaged_bytes_never_raise_anything_else(at, value):
    data = bytearray(encoded(Image.fromarray(noise(12, 12))))
    data[at % len(data)] ^= value
    try:
        raw = ImageFeatures(max_pixels=10_000).decode(bytes(data), "record")
    except BadRecord:
        return
    assert raw.dtype == np.uint8 and raw.shape[2] == 3


def test_values_are_normalised():
    features, frames = ImageFeatures(4, 4, mean=0.25, std=0.5).extract(np.full((4, 4, 3), 255, np.uint8))
    assert frames == 1 and features.dtype == np.float32
    np.testing.assert_allclose(features, 1.5, rtol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["stretch", "crop", "pad"]), st.sampled_from([1, 3]))
def test_every_size_gives_the_static_shape(h, w, resize, channels):
    spec = ImageFeatures(9, 6, channels, resize)
    features, _ = spec.extract(noise(h, w))
    assert features.shape == spec.shape == (9, 6, channels)
    assert features.min() >= -1 and features.max() <= 1
    assert spec.picture(features, 1).shape == (9, 6, 3)


def test_crop_keeps_the_centre_pad_keeps_everything_stretch_deforms():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # the centre third is white
    size = {"height": 8, "width": 8, "mean": 0, "std": 1}
    crop, _ = ImageFeatures(resize="crop", **size).extract(wide)
    np.testing.assert_array_equal(crop[:, 1:-1], 1)
    pad, _ = ImageFeatures(resize="pad", background=51, **size).extract(wide)
    np.testing.assert_allclose(pad[[0, 1, 6, 7]], 0.2, rtol=1e-6)
    assert pad[3, 0, 0] < 0.1 and pad[3, 4, 0] > 0.9
    stretch, _ = ImageFeatures(resize="stretch", **size).extract(wide)
    assert stretch[:, :2].max() < 0.1 and stretch[:, 3:5].min() > 0.8


@pytest.mark.parametrize("height, width", [(224, 224), (32, 48), (7, 3)])
def test_the_box_of_a_crop_lies_within_every_picture(height, width):
    for h in (1, 3, 29, 224, 1000):
        for w in range(1, 1001):
            left, top, right, bottom = crop_box(w, h, width / height)
            assert 0 <= left < right <= w and 0 <= top < bottom <= h
            assert (right - left) / (bottom - top) == pytest.approx(width / height)
            assert right - left == pytest.approx(w) or bottom - top == pytest.approx(h)
            assert left + right == pytest.approx(w) and top + bottom == pytest.approx(h)


@pytest.mark.parametrize("size", [29, 58, 225, 232])
def test_pictures_whose_crop_would_be_rounded_beyond_the_edge(size):
    spec = ImageFeatures(224, 224)
    for h, w in ((size, size), (size, size + 5), (size + 5, size)):
        assert spec.extract(noise(h, w))[0].shape == spec.shape


def test_a_picture_of_the_right_size_is_untouched():
    pixels = noise(8, 8)
    features, _ = ImageFeatures(8, 8, mean=0, std=1).extract(pixels)
    np.testing.assert_allclose(features * 255, pixels, atol=1e-4)
    np.testing.assert_allclose(
        ImageFeatures(8, 8).picture(ImageFeatures(8, 8).extract(pixels)[0], 1) * 255, pixels, atol=1e-3
    )


def test_grey_is_luma():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    features, _ = ImageFeatures(4, 4, channels=1, mean=0, std=1).extract(red)
    np.testing.assert_allclose(features, 76 / 255, rtol=1e-5)


@pytest.mark.parametrize("fields", [{"height": 0}, {"std": 0.0}, {"background": 256}, {"max_pixels": 10**9}])
def test_fields_out_of_bounds_are_named(fields):
    with pytest.raises(SpecError, match=f"ImageFeatures.{next(iter(fields))} is"):
        ImageFeatures(**fields)
