"""The persistent compilation cache, so that restarts need not recompile."""

import functools

import jax

from polygpt.cache_folder import cache_folder


def enable_cache() -> None:
    """Stores compiled programs in the cache folder, unless JAX is configured with another one."""
    if jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@functools.cache
def compiler_options(platform: str | None = None) -> dict[str, str] | None:
    """XLA options of the training step for a platform (default: the default backend). pmap accepts none.

    On CPUs this disables YNNPACK fusions: without them a quickstart step takes about 10 % less time, and small batched
    matmuls, as in attention, half the time. The option is experimental and omitted for compilers that do not know it.
    """
    if (platform or jax.default_backend()) != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options
