"""The persistent compilation cache: a run that starts again need not compile again."""

import functools

import jax

from polygpt.cache import cache_folder


def enable_cache() -> None:
    """Keeps compiled programs in the cache folder, unless JAX was told another place."""
    if jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@functools.cache
def compiler_options(platform: str | None = None) -> dict[str, str] | None:
    """XLA options of the training step for a platform, the default backend's unless given; pmap takes none.

    On a CPU the YNNPACK fusions are left out: a step of the quickstart takes about a tenth less time without them, and
    small batched products, such as those of attention, half. The option is experimental: a compiler that does not know
    it is left alone.
    """
    if (platform or jax.default_backend()) != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options
