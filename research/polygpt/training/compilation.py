"""The persistent compilation cache: a run that starts again need not compile again."""

import jax

from polygpt.cache import cache_folder


def enable_cache() -> None:
    """Keeps compiled programs in the cache folder, unless JAX was told another place."""
    if jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
