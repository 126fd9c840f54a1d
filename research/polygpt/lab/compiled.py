"""Compilation in the lab: fast, and without optimisations known to be wrong."""

import functools
from collections.abc import Callable

import jax

from polygpt.runtime.compilation import compiler_options


def compiled(function: Callable, *static: str) -> Callable:
    """`jax.jit(function)`, with the names of static arguments.

    On CPU it is compiled without LLVM optimisations, because each program is run only a few times, and, as in training,
    without YNNPACK fusions: with them, jax 0.10.2 computes wrong gradients in a vmapped backward pass through a norm,
    which then depend on unrelated inputs.
    """
    return jax.jit(function, static_argnames=static, compiler_options=_options())


@functools.cache
def _options() -> dict[str, str] | None:
    known = compiler_options()
    return None if known is None else {**known, "xla_backend_optimization_level": "0"}
