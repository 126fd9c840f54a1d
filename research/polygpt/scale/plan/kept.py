"""Compiled programs of plans, kept in the cache folder: what took minutes to compile is read in a moment.

A program is found again by all that it depends on: the lowered step, the devices it is for, the compiler, and the
flags and settings that this was given.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from polygpt.cache_folder import cache_folder
from polygpt.files import write_atomically

MOST = 300
"""Programs that are kept; of more, those used longest ago go."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a compiler gave.

    Attributes:
        text: the compiled program; None where the memory did not suffice.
        figures: bytes by name, as the compiler's memory analysis gives them.
        refusal: what it said where the memory did not suffice.
        seconds: that it took.
    """

    text: str | None
    figures: dict[str, int]
    refusal: str
    seconds: float


def place(parts: Sequence[str]) -> Path:
    """The file of the program that these texts determine."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return cache_folder() / "plans" / f"{digest.hexdigest()}.json.gz"


def read(path: Path) -> Kept | None:
    """What is kept there; None if nothing that can be read."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = Kept(**json.load(file))
        path.touch()
    except (OSError, EOFError, ValueError, TypeError):
        return None
    return found


def write(path: Path, kept: Kept) -> None:
    """Keeps it. A cache folder that cannot be written only costs time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, gzip.compress(json.dumps(dataclasses.asdict(kept)).encode(), 3))
        by_age = sorted(path.parent.glob("*.json.gz"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in by_age[MOST:]:
            old.unlink(missing_ok=True)
