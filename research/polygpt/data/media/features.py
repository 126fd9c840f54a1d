"""The contract of media features: encoded bytes -> raw samples -> the array that an adapter reads."""

import dataclasses
from pathlib import Path

import numpy as np

from polygpt.errors import BadRecord
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Features(Spec):
    """How to turn encoded media of one modality into arrays of a static shape. One subclass per file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features of one item, which are float32."""
        raise NotImplementedError

    def decode(self, source: bytes | Path, place: str) -> np.ndarray:
        """Decodes a file to raw samples.

        Args:
            source: the encoded bytes, or the path of the file.
            place: names the record in errors.

        Raises:
            BadRecord: if the file is missing, corrupt, of an unknown format or outside the bounds.
        """
        raise NotImplementedError

    def extract(self, raw: np.ndarray) -> tuple[np.ndarray, int]:
        """(features, float32 of `shape`; the number of real leading frames). An image is one frame."""
        raise NotImplementedError

    def load(self, source: bytes | Path, place: str) -> tuple[np.ndarray, int]:
        """`extract` of `decode`. A subclass may save the detour over raw samples."""
        return self.extract(self.decode(source, place))

    def real(self, features: np.ndarray, frames: int) -> np.ndarray:
        """The extracted features without padding, as a view. Augmentations of features modify it."""
        return features

    def picture(self, features: np.ndarray, frames: int) -> np.ndarray:
        """The features as an image for reports: [height, width, 3] in 0..1, or [height, width] with any range.

        Row 0 is at the top. The default shows the numbers themselves.
        """
        return features.reshape(features.shape[0], -1)


def read(source: bytes | Path, place: str) -> bytes:
    """The encoded bytes of a medium.

    Raises:
        BadRecord: if the file is missing, unreadable or empty.
    """
    if isinstance(source, Path):
        try:
            source = source.read_bytes()
        except FileNotFoundError:
            raise BadRecord("missing file", place) from None
        except OSError as error:
            raise BadRecord("unreadable file", place, error.strerror or "") from error
    if not source:
        raise BadRecord("empty file", place)
    return source


def one_line(error: BaseException) -> str:
    """The message of a decoding library's error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
