"""Encodes arrays as PNG and WAV."""

import io

import numpy as np
import soundfile
from PIL import Image


def png(picture: np.ndarray) -> bytes:
    """Encodes an image [h, w, 3] in 0..1, or a map [h, w] of any range with the magma colour map."""
    if picture.ndim == 2:
        from matplotlib import colormaps  # local import: slow

        low, high = float(picture.min()), float(picture.max())
        picture = colormaps["magma"]((picture - low) / max(high - low, 1e-9))[..., :3]
    out = io.BytesIO()
    Image.fromarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)).save(out, "PNG", optimize=True)
    return out.getvalue()


def wav(samples: np.ndarray, rate: int) -> bytes:
    """float32 samples in -1..1 as 16-bit PCM."""
    out = io.BytesIO()
    soundfile.write(out, np.clip(samples, -1, 1), rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def grid(shape: tuple[int, ...], positions: int, timeline: bool) -> tuple[int, int]:
    """(rows, columns) of the grid of `positions` of a media item, in row-major order.

    A timeline is one row. An image of height and width `shape[:2]` has the grid with the most nearly square cells.
    """
    if timeline:
        return 1, positions
    height, width = shape[:2]
    fits = [(rows, positions // rows) for rows in range(1, positions + 1) if positions % rows == 0]
    return min(fits, key=lambda cells: abs(np.log(height / cells[0]) - np.log(width / cells[1])))
