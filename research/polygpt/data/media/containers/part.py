"""The common result of all audio containers: complete recordings that libsndfile reads in full."""

from typing import NamedTuple


class Incomplete(Exception):
    """An audio file is truncated or damaged. The message says where, on one line and without the file's name."""


class Part(NamedTuple):
    """One complete recording. A file contains several if recordings were joined."""

    encoded: bytes
    """A file whose header states its true length, so that libsndfile reads all of it and nothing else."""
    samples: int | None = None
    """Samples per channel, for the formats whose header cannot state them. The decoder may return more."""
