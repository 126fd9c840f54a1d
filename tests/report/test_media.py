"""Arrays as the files that a page shows."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from polygpt.report import media


def test_a_picture_survives_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    opened = Image.open(io.BytesIO(media.png(pixels / 255)))
    assert opened.format == "PNG" and opened.size == (7, 5)
    np.testing.assert_array_equal(np.asarray(opened), pixels)


def test_a_map_is_dark_where_low_and_bright_where_high():
    shades = np.asarray(Image.open(io.BytesIO(media.png(np.array([[-4.0, 0.0, 4.0]]))))).sum(axis=-1)[0]
    assert shades[0] < shades[1] < shades[2]
    assert Image.open(io.BytesIO(media.png(np.zeros((2, 2))))).size == (2, 2), "a constant map has no range"


def test_a_recording_survives_to_16_bits():
    samples = np.sin(np.arange(800) / 10).astype(np.float32) * 0.8
    read, rate = soundfile.read(io.BytesIO(media.wav(samples, 8000)))
    assert rate == 8000
    np.testing.assert_allclose(read, samples, atol=1 / 2**15)
    assert np.abs(soundfile.read(io.BytesIO(media.wav(samples * 4, 8000)))[0]).max() <= 1


@pytest.mark.parametrize(
    ("shape", "positions", "timeline", "cells"),
    [
        ((32, 32, 3), 16, False, (4, 4)),
        ((32, 64, 3), 8, False, (2, 4)),
        ((64, 32, 3), 8, False, (4, 2)),
        ((8, 8, 3), 7, False, (1, 7)),
        ((80, 50), 12, True, (1, 12)),
    ],
)
def test_positions_tile_the_picture(shape, positions, timeline, cells):
    found = media.grid(shape, positions, timeline)
    assert found == cells or found[::-1] == cells and shape[0] == shape[1]
