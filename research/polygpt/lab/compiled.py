"""How the lab compiles: quickly, and without what is known to compute wrongly."""

import functools
from collections.abc import Callable

import jax

from polygpt.runtime.compilation import compiler_options


def compiled(function: Callable, *static: str) -> Callable:
    """`jax.jit(function)`, with the names of static arguments.

    On a CPU it is compiled without LLVM's optimisations, as each program is run only a few times.

    There the YNNPACK fusions are left out too, as in training: with them jax 0.10.2 computes wrong gradients where a
    backward pass through a norm is vmapped, moved by inputs on which the result does not depend.
    """
    return jax.jit(function, static_argnames=static, compiler_options=_options())


@functools.cache
def _options() -> dict[str, str] | None:
    known = compiler_options()
    return None if known is None else {**known, "xla_backend_optimization_level": "0"}
