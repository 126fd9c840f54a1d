"""The contract of a medium's features: encoded bytes -> raw samples -> the array that an adapter reads."""

import dataclasses
from pathlib import Path

import numpy as np

from polygpt.errors import BadRecord
from polygpt.spec import Spec


@dataclasses.dataclass(frozen=True)
class Features(Spec):
    """How encoded media of one modality become arrays of one static shape. Subclasses live one a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one item's features, float32."""
        raise NotImplementedError

    def decode(self, source: bytes | Path, place: str) -> np.ndarray:
        """The raw samples of an encoded medium.

        Args:
            source: the encoded bytes or the path of the file that holds them.
            place: the record, named in errors.

        Raises:
            BadRecord: if it is missing, corrupt, of an unknown format or outside the bounds.
        """
        raise NotImplementedError

    def extract(self, raw: np.ndarray) -> tuple[np.ndarray, int]:
        """(float32 array of `shape`, number of leading frames that are real). A picture is one frame."""
        raise NotImplementedError

    def real(self, features: np.ndarray, frames: int) -> np.ndarray:
        """The part of extracted features, as a view, that is not padding. Augmentations of features work on it."""
        return features

    def picture(self, features: np.ndarray, frames: int) -> np.ndarray:
        """What a person looks at: [height, width, 3] in 0..1, or [height, width] of any range, row 0 on top.

        Unless a subclass knows better, the numbers themselves.
        """
        return features.reshape(features.shape[0], -1)


def read(source: bytes | Path, place: str) -> bytes:
    """The encoded bytes.

    Raises:
        BadRecord: if the file is missing or cannot be read, or there are no bytes.
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
    """An error of a decoding library as a detail of one line."""
    return " ".join(str(error).split()) or type(error).__name__
