"""Pads batches to a small set of shapes, so that few programs are compiled."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from polygpt.sequence import NAMED_ARRAYS, PADDING, Batch, Media


def bucket(n: int, least: int) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << (max(n, least) - 1).bit_length()


def pad(batch: Batch, batch_size: int, seq_len: int, labels: Iterable[str] = ()) -> Batch:
    """The batch with padding rows up to `batch_size` and padding positions up to `seq_len`; NumPy arrays.

    Of its labels it keeps those named; there are none at padding.

    Media arrays are cut to the largest number of items that a row uses, rounded up to a power of two: encoding an
    unused item costs as much as a used one.
    """

    def grow(array, value=0, axes=1):
        array = np.asarray(array)
        widths = [(0, batch_size - array.shape[0]), (0, seq_len - array.shape[1])][:axes]
        return np.pad(array, widths + [(0, 0)] * (array.ndim - axes), constant_values=value)

    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch) if f.name not in NAMED_ARRAYS}
    arrays = {
        name: None if array is None else grow(array, PADDING if name == "modality_BT" else 0, axes=2)
        for name, array in arrays.items()
    }
    media = {}
    for name, medium in batch.media.items():
        used = bucket(int((medium.length_BN > 0).sum(axis=1).max(initial=0)), 1)
        media[name] = Media(grow(medium.features[:, :used]), grow(medium.length_BN[:, :used]))
    extra = {name: grow(batch.extra[name], np.nan, axes=2) for name in labels if name in batch.extra}
    return Batch(**arrays, media=media, extra=extra)
