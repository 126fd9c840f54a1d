"""Compilation in the lab: fast, and without optimisations known to be wrong."""

import functools
import os
from collections.abc import Callable

import jax

from polygpt.runtime.compilation import compiler_options


def compiled(function: Callable, *static: str) -> Callable:
    """`jax.jit(function)`, with the names of static arguments.

    On CPU it is compiled without LLVM optimisations and without the emitters that write each fusion by way of MLIR,
    because each program is run only a few times, and, as in training, without YNNPACK fusions: with them, jax 0.10.2
    computes wrong gradients in a vmapped backward pass through a norm, which then depend on unrelated inputs.
    """
    return jax.jit(function, static_argnames=static, compiler_options=_options())


def flags() -> str:
    """XLA_FLAGS for another process that compiles as fast: those of this one and more."""
    given = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in (_options() or {}).items() if value != "" and name not in given}
    return " ".join([given, *(f"--{name}={str(value).lower()}" for name, value in options.items())]).strip()


QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": "1"}
"""Options that not every compiler knows; with them a program compiles in half the time."""


@functools.cache
def _options() -> dict[str, str | bool] | None:
    known = compiler_options()
    if known is None:
        return None
    options = {**known, "xla_backend_optimization_level": "0"}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options | QUICK).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return options
    return options | QUICK
