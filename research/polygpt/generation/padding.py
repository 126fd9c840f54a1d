"""Few shapes, so few programs: batches are padded to sizes that many of them share."""

import dataclasses

import numpy as np

from polygpt.sequence import PADDING, Batch, Media


def bucket(n: int, least: int) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << (max(n, least) - 1).bit_length()


def pad(batch: Batch, rows: int, length: int) -> Batch:
    """The batch with padding rows up to `rows` and padding positions up to `length`; NumPy arrays."""

    def grow(array, value=0, axes=1):
        array = np.asarray(array)
        widths = [(0, rows - array.shape[0]), (0, length - array.shape[1])][:axes]
        return np.pad(array, widths + [(0, 0)] * (array.ndim - axes), constant_values=value)

    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch) if f.name != "media"}
    arrays = {name: grow(array, PADDING if name == "modality_BT" else 0, axes=2) for name, array in arrays.items()}
    media = {name: Media(grow(m.features), grow(m.length_BN)) for name, m in batch.media.items()}
    return Batch(**arrays, media=media)
