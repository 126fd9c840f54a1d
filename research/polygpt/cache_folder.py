"""The cache folder for prepared data and compiled programs."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ABANDONED = 3600  # seconds after which an unfinished folder is assumed to belong to a killed process


def cache_folder() -> Path:
    """POLYGPT_CACHE, or ~/.cache/polygpt. It may not exist yet; everything in it can be recreated."""
    return Path(os.environ.get("POLYGPT_CACHE") or "~/.cache/polygpt").expanduser()


@contextlib.contextmanager
def made_whole(place: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which is moved to `place` atomically at the end, or removed on failure.

    A killed process leaves nothing that looks finished, and its remains are removed later. If two processes fill it at
    once, one wins and the other uses its result.

    Raises:
        OSError: the folder cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    work = Path(tempfile.mkdtemp(prefix=f".building-{place.name}-", dir=place.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp gives 0o700, but a cache may be shared
        try:
            work.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes the remains of killed processes."""
    for path in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
