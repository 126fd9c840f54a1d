"""Which backend computes an attention: the one that was asked for, or the best for the platform and the shapes.

A backend that cannot compute what is asked is never replaced in silence: the reason is logged once, or, with `strict`,
raised. All backends give the same result to rounding, so the choice is one of time and memory alone.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import jax

from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.errors import SpecError

BACKENDS = ("reference", "chunked", "library", "flex")
"""Files of this folder, see `problem.py`."""
LONG = 1024
"""Keys from which on the automatic choice avoids the materialised matrix of the reference."""

_log = logging.getLogger(__name__)
_target: ContextVar[str | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Lets the automatic choice be made for "tpu", "gpu" or "cpu", whatever this machine is, as planning ahead wants."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """The platform that programs are being compiled for."""
    return _target.get() or jax.default_backend()


def attend(
    rule: Rule, operands: Operands, backend: str = "auto", strict: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), as `problem.py` says.

    Args:
        rule, operands: the problem.
        backend: one of `BACKENDS`, or "auto".
        strict: whether a backend that refuses is an error; else the next best computes, and the reason is logged.

    Raises:
        SpecError: with `strict`, naming the backend and its reason.
    """
    return _module(choose(rule, operands, backend, strict)).attend(rule, operands)


def choose(rule: Rule, operands: Operands, backend: str = "auto", strict: bool = False) -> str:
    """The name of the backend that `attend` uses."""
    if backend != "auto":
        reason = _module(backend).refuses(rule, operands)
        if reason is None:
            return backend
        if strict:
            raise SpecError(f"attention.backend {backend!r} cannot compute this: {reason} (strict is set)")
        instead = _best(rule, operands)
        _say(f"attention: {instead} instead of {backend}: {reason}")
        return instead
    return _best(rule, operands)


def _best(rule: Rule, operands: Operands) -> str:
    S = operands.key_BKSd.shape[2]
    T = operands.query_BHTd.shape[2]
    if S < LONG or T == 1:  # small, or a decode step, whose scores are one row
        return "reference"
    preferred = {"tpu": ("library", "flex"), "gpu": ("library",)}.get(platform(), ())
    return next((name for name in preferred if _module(name).refuses(rule, operands) is None), "chunked")


@functools.cache
def _say(message: str) -> None:
    """Logs a message once."""
    _log.warning(message)


@functools.cache
def _module(name: str):
    """A backend's file, imported when it is first wanted: Pallas takes a second."""
    return importlib.import_module(f"polygpt.attention.kernels.{name}")
