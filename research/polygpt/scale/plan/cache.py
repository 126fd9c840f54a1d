"""Cache of compiled programs: a program that took minutes to compile loads quickly from the cache folder.

The key covers everything that a program depends on: the lowered step, the devices, the compiler's version, flags and
settings.
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
"""Maximum number of cached programs. The least recently used are deleted."""


@dataclasses.dataclass(frozen=True)
class Cached:
    """The result of a compilation.

    Attributes:
        text: HLO text of the compiled program; None if the compiler ran out of memory.
        figures: bytes by name, from the compiler's memory analysis.
        refusal: the error message if the compiler ran out of memory.
        seconds: compile time.
    """

    text: str | None
    figures: dict[str, int]
    refusal: str
    seconds: float


def place(parts: Sequence[str]) -> Path:
    """The cache file for this key, a sequence of texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return cache_folder() / "plans" / f"{digest.hexdigest()}.json.gz"


def read(path: Path) -> Cached | None:
    """The cached result; None if the file is missing or unreadable."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = Cached(**json.load(file))
        path.touch()
    except (OSError, EOFError, ValueError, TypeError):
        return None
    return found


def write(path: Path, cached: Cached) -> None:
    """Writes a result. Ignores errors of the file system, because the cache only saves time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, gzip.compress(json.dumps(dataclasses.asdict(cached)).encode(), 3))
        by_age = sorted(path.parent.glob("*.json.gz"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in by_age[MOST:]:
            old.unlink(missing_ok=True)
