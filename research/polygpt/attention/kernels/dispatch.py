"""Chooses the attention backend: the requested one, or the best for the platform and the shapes.

A backend that cannot compute a problem is never replaced silently: the reason is logged once or, with `strict`, raised.
All backends give the same result up to rounding, so the choice only affects time and memory.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import jax

from polygpt import sharding
from polygpt.attention.kernels import sharded
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.errors import SpecError

DESCRIPTIONS = {
    "reference": "materialises the matrix of scores: supports everything on every platform; memory O(T S)",
    "chunked": "blocks of queries and keys in plain XLA, skips empty blocks: supports everything on every platform; "
    "memory O(T + S)",
    "library": "softmax only. TPU: splash attention, for media towers and masks without spans (not decoders, whose "
    "mask has spans): SameSegment with Causal and distances of positions, SoftCap, lengths that are multiples of 128, "
    "no cache; memory O(T + S). GPU: cuDNN, for 16-bit dtypes, any mask, no score modification, even lengths, head "
    "widths that are multiples of 8 up to 128; its own causality, windows and lengths for rows of one example without "
    "spans, "
    f"memory O(T + S); for other rows a mask in memory, B T S up to {2**29:,} elements, and chunked beyond. "
    "Elsewhere jax.nn.dot_product_attention, for any mask and "
    "additive score modifications; memory O(T S). Where neither applies, tokamax if it is installed: values of another "
    "width, SoftCap",
    "flex": "one fused kernel for every mask and score modification, in float32 and bfloat16, skips empty blocks: on "
    "TPUs, and interpreted on CPU for tests; not on GPUs; memory O(T + S)",
}
"""The backends, one file of this folder each (see `problem.py`): what they are and what they support."""
BACKENDS = tuple(DESCRIPTIONS)
"""Their names."""
LONG = 512
"""From this number of keys on, the automatic choice avoids the reference, which materialises the matrix of scores."""
DENSE = 2**29
"""Maximum size of a mask as an array, B T S, for cuDNN: 1 GiB at 16 bits."""

_log = logging.getLogger(__name__)
_target: ContextVar[str | None] = ContextVar("target", default=None)
_block: ContextVar[int | None] = ContextVar("block", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Makes the automatic choice for "tpu", "gpu" or "cpu" instead of this machine's platform, for planning.

    It must surround tracing: programs traced earlier for another platform are not retraced.
    """
    with _set(_target, platform):
        yield


@contextlib.contextmanager
def in_blocks_of(size: int) -> Iterator[None]:
    """Makes chunked and flex use blocks of `size` positions while a program is traced.

    A short row then behaves like a long one: it has several blocks, including empty and full ones.
    """
    with _set(_block, size):
        yield


def block() -> int | None:
    """The block size set by `in_blocks_of`; None leaves it to the backend."""
    return _block.get()


@contextlib.contextmanager
def _set(variable: ContextVar, value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def platform() -> str:
    """The platform to compile for."""
    return _target.get() or jax.default_backend()


def attend(rule: Rule, operands: Operands, backend: str = "auto", strict: bool = False) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`; under a layout each device computes its part, see `sharded.py`.

    Args:
        rule, operands: the problem.
        backend: one of `BACKENDS`, or "auto".
        strict: whether it is an error if the backend cannot compute the problem; if not, the next best backend is used
            and the reason is logged.

    Raises:
        SpecError: with `strict`; names the backend and the reason.
    """

    operands = operands.with_labels(rule.mask.labels())

    def module(rule, operands, part=False):
        return _module(choose(rule, operands, backend, strict, part))

    if (layout := sharding.active()) is not None:
        return sharded.attend(rule, operands, layout, module)
    return module(rule, operands).attend(rule, operands)


def choose(rule: Rule, operands: Operands, backend: str = "auto", strict: bool = False, part: bool = False) -> str:
    """The name of the backend that `attend` uses; raises like `attend`.

    `part` means that the keys are only a part of all keys, and results will be combined with those of other parts.
    """
    if backend == "auto":
        return _best(rule, operands, part)
    reason = _refuses(backend, rule, operands, part)
    if reason is None:
        return backend
    if strict:
        raise SpecError(f"attention.backend is {backend!r} and strict is set, but it cannot compute this: {reason}")
    instead = _best(rule, operands, part)
    warn_fallback(instead, backend, reason)
    return instead


def describe() -> dict[str, str]:
    """A description of each backend and of the automatic choice."""
    automatic = (
        f"reference below {LONG} keys and for single queries; otherwise, on TPU library, or flex if that does not "
        "apply, as for decoders; "
        f"on GPU library, for any mask up to B T S = {DENSE:,} and, at any length, for causal masks with or without a "
        "window; chunked everywhere else, such as for float32, score modifications and rings"
    )
    return {"auto": automatic, **DESCRIPTIONS}


def _refuses(backend: str, rule: Rule, operands: Operands, part: bool) -> str | None:
    if part and not hasattr(_module(backend), "gradients"):
        return f"positions are split in a ring, but {backend} cannot compute gradients for a part of the keys"
    return _module(backend).refuses(rule, operands)


def _best(rule: Rule, operands: Operands, part: bool) -> str:
    T, S = operands.query_BHTd.shape[2], operands.key_BKSd.shape[2]
    if S < LONG or T == 1:  # small, or a decode step with a single row of scores
        return "reference"
    preferred = {"tpu": ("library", "flex"), "gpu": ("library",)}.get(platform(), ())
    able = (name for name in preferred if _refuses(name, rule, operands, part) is None)
    return next((name for name in able if name != "library" or _module(name).suits(rule, operands)), "chunked")


@functools.cache
def warn_fallback(instead: str, backend: str, reason: str) -> None:
    """Logs once that another backend is used instead of the requested one, and why."""
    _log.warning(f"attention: {instead} instead of {backend}: {reason}")


@functools.cache
def _module(name: str):
    """A backend's module, imported on first use because Pallas takes a second."""
    return importlib.import_module(f"polygpt.attention.kernels.{name}")
