"""Where prepared data and compiled programs are kept between runs."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ABANDONED = 3600  # seconds after which an unfinished folder is taken for one whose process was killed


def cache_folder() -> Path:
    """POLYGPT_CACHE, or ~/.cache/polygpt. It may not exist yet; all that lies in it can be made again."""
    return Path(os.environ.get("POLYGPT_CACHE") or "~/.cache/polygpt").expanduser()


@contextlib.contextmanager
def made_whole(place: Path) -> Iterator[Path]:
    """A folder to fill, beside `place`, which is moved there whole when the block ends, and removed if it fails.

    A process that is killed leaves nothing that looks finished, and is swept up after; of two that fill at once, one
    wins and the other takes its result.

    Raises:
        OSError: if the folder cannot be written.
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
            if not place.is_dir():  # where it is one, another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what killed processes left behind."""
    for path in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
