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


OPTIONS = {
    # No YNNPACK fusions: a quickstart step takes about 10 % less time, small batched matmuls, as in attention, half.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # Reduce-scatter of gradients, where the compiler would otherwise all-reduce them and discard all but a part: the
    # layout that it needs, and padding where the devices do not divide the tiles.
    "tpu": {
        "xla_tpu_assign_all_reduce_scatter_layout": "true",
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
        "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
        "xla_tpu_enable_reduce_scatter_legalizer": "true",
    },
}
"""Options of the XLA compilers, by platform."""


@functools.cache
def compiler_options(platform: str | None = None) -> dict[str, str] | None:
    """XLA options of the training step for a platform (default: the default backend). pmap accepts none.

    The options are experimental, and omitted if the backend's compiler does not know them.
    """
    here = jax.default_backend()
    options = OPTIONS.get(platform or here)
    if options is None or platform not in (None, here):
        return options
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options
