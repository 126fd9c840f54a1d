"""Where prepared data and compiled programs are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """POLYGPT_CACHE, or ~/.cache/polygpt. It may not exist yet; all that lies in it can be made again."""
    return Path(os.environ.get("POLYGPT_CACHE") or "~/.cache/polygpt").expanduser()
