"""Recordings as mono samples: complete or rejected, whatever length the container states."""

import io

import numpy as np
import soundfile

from polygpt.data.media.containers import flac, mpeg, ogg, sized
from polygpt.data.media.containers.part import Incomplete, Part
from polygpt.errors import BadRecord

FORMATS = "WAV, W64, AIFF, AU, CAF, NIST SPHERE, FLAC, Ogg and MP3"
"""Supported formats. libsndfile opens more, but in those, truncated files cannot be told from complete ones."""
CANCELLED = 0.05
"""Channels cancel if the power of their mean is below this fraction of their mean power. Independent channels leave
1 / channels of it, which is more for up to 16 channels; channels of opposite phase leave nothing."""


class Recording:
    """An audio file, opened but not decoded.

    Attributes:
        rate: sample rate in Hz.
        channels: number of channels; the highest number, if several recordings were joined.
        samples: number of samples per channel.
    """

    def __init__(self, encoded: bytes, place: str):
        """
        Args:
            encoded: the bytes of the file.
            place: the record, named in errors.

        Raises:
            BadRecord: if the format is unknown, or the file is truncated or damaged.
        """
        self._place, self._parts = place, _parts(encoded, place)
        try:
            self._files = [soundfile.SoundFile(io.BytesIO(part.encoded)) for part in self._parts]
        except soundfile.LibsndfileError as error:
            raise BadRecord("corrupt audio", place, error.error_string) from error
        lengths = [file.frames if part.samples is None else part.samples for file, part in self._each()]
        rates = {file.samplerate for file in self._files}
        if len(rates) > 1:
            raise BadRecord("wrong rate", place, f"joined from recordings of {' and '.join(map(str, rates))} Hz")
        self.rate = rates.pop()
        self.channels = max(file.channels for file in self._files)
        self.samples = sum(lengths)

    def _each(self) -> zip:
        return zip(self._files, self._parts, strict=True)

    def decode(self) -> np.ndarray:
        """Mono float32 [samples]; joined recordings follow each other.

        Raises:
            BadRecord: if samples are missing or not finite.
        """
        return np.concatenate([self._decode(file, part) for file, part in self._each()])

    def _decode(self, file: soundfile.SoundFile, part: Part) -> np.ndarray:
        stated = file.frames if part.samples is None else part.samples
        try:
            channels = file.read(stated, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise BadRecord("corrupt audio", self._place, error.error_string) from error
        if len(channels) < stated:
            raise BadRecord("corrupt audio", self._place, f"{len(channels)} of its {stated} samples can be decoded")
        if not np.isfinite(channels).all():
            raise BadRecord("corrupt audio", self._place, "samples that are not finite")
        return down_mix(channels)


def down_mix(channels: np.ndarray) -> np.ndarray:
    """The mean of channels [samples, channels], or the channel with the highest power if they cancel each other.

    Channels cancel if one is the negative of the other, as recorded by a wrongly wired microphone.
    """
    if channels.shape[1] == 1 or not len(channels):
        return channels[:, 0]
    mean = channels.mean(axis=1)
    power = np.square(channels, dtype=np.float64).mean(axis=0)
    if np.square(mean, dtype=np.float64).mean() < CANCELLED * power.mean():
        return channels[:, power.argmax()]
    return mean


def _parts(encoded: bytes, place: str) -> list[Part]:
    tag = mpeg.id3_size(encoded)
    bare = encoded[tag:]
    try:
        for family in (sized, flac, ogg, mpeg):
            if family.recognises(bare):
                return family.parts(bare)
    except Incomplete as error:
        raise BadRecord("corrupt audio", place, str(error)) from error
    if tag:
        raise BadRecord("corrupt audio", place, "no recording after its ID3 tag")
    raise BadRecord("unknown audio format", place, f"none of {FORMATS}")
