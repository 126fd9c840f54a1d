"""The persistent compilation cache: a run that starts again need not compile again."""

import os
from pathlib import Path

import jax


def enable_cache() -> None:
    """Keeps compiled programs under POLYGPT_CACHE (default ~/.cache/polygpt), unless JAX was told another place."""
    if jax.config.jax_compilation_cache_dir:
        return
    folder = Path(os.environ.get("POLYGPT_CACHE") or "~/.cache/polygpt").expanduser() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
