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

from polygpt import sharding
from polygpt.attention.kernels import sharded
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.errors import SpecError

ABOUT = {
    "reference": "the matrix of scores as a whole: computes everything, everywhere; its memory grows with T S",
    "chunked": "blocks of queries and keys in plain XLA, empty ones skipped: computes everything, everywhere; its "
    "memory grows with T + S",
    "library": "softmax alone. TPU: splash attention, for media towers and masks without spans (it refuses decoders, "
    "whose mask has them): SameSegment with Causal and distances of positions, SoftCap, lengths that are multiples of "
    "128, no cache; memory T + S. GPU: cuDNN, for 16 bits, any mask, no score modification, even lengths, heads of a "
    "multiple of 8 up to 128; memory T S. Elsewhere "
    "jax.nn.dot_product_attention, for any mask and what adds a bias to scores; memory T S. Where both refuse, tokamax "
    "if it is installed: values of another width, SoftCap",
    "flex": "one fused kernel for every mask and score modification, in float32 and bfloat16, empty blocks skipped: "
    "TPUs, and interpreted on a CPU for tests; no GPUs; its memory grows with T + S",
}
"""Each backend, a file of this folder (see `problem.py`): what it is, what it takes, and by that what it refuses."""
BACKENDS = tuple(ABOUT)
"""Their names."""
LONG = 512
"""Keys from which on the automatic choice avoids the materialised matrix of the reference."""
DENSE = 2**29
"""Numbers of a dense mask, B T S, up to which the automatic choice takes cuDNN: 1 GiB at 16 bits."""

_log = logging.getLogger(__name__)
_target: ContextVar[str | None] = ContextVar("target", default=None)
_block: ContextVar[int | None] = ContextVar("block", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Lets the automatic choice be made for "tpu", "gpu" or "cpu", whatever this machine is, as planning ahead does.

    It has to surround tracing: what was traced before under another platform is not traced again.
    """
    with _set(_target, platform):
        yield


@contextlib.contextmanager
def in_blocks_of(size: int) -> Iterator[None]:
    """Lets chunked and flex work in blocks of so many positions while a program is traced.

    What a short row shows then is what a long one would: several blocks, empty and full ones among them.
    """
    with _set(_block, size):
        yield


def block() -> int | None:
    """The size of blocks that `in_blocks_of` asks for; None leaves it to the backend."""
    return _block.get()


@contextlib.contextmanager
def _set(variable: ContextVar, value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def platform() -> str:
    """The platform that programs are being compiled for."""
    return _target.get() or jax.default_backend()


def attend(rule: Rule, operands: Operands, backend: str = "auto", strict: bool = False) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), as `problem.py` says; under a layout each device computes its part, see `sharded.py`.

    Args:
        rule, operands: the problem.
        backend: one of `BACKENDS`, or "auto".
        strict: whether a backend that refuses is an error; else the next best computes, and the reason is logged.

    Raises:
        SpecError: with `strict`, naming the backend and its reason.
    """

    def module(rule, operands, part=False):
        return _module(choose(rule, operands, backend, strict, part))

    if (layout := sharding.active()) is not None:
        return sharded.attend(rule, operands, layout, module)
    return module(rule, operands).attend(rule, operands)


def choose(rule: Rule, operands: Operands, backend: str = "auto", strict: bool = False, part: bool = False) -> str:
    """The name of the backend that `attend` uses; errors as `attend`.

    `part` says that the keys are some of those that the queries see, and results are to be joined with others.
    """
    if backend == "auto":
        return _best(rule, operands, part)
    reason = _refuses(backend, rule, operands, part)
    if reason is None:
        return backend
    if strict:
        raise SpecError(f"attention.backend is {backend!r} and strict is set, but it cannot compute this: {reason}")
    instead = _best(rule, operands, part)
    say_instead(instead, backend, reason)
    return instead


def about() -> dict[str, str]:
    """A text for each backend, and for the automatic choice."""
    automatic = (
        f"reference below {LONG} keys and for one query at a time; else on a TPU library, or flex where that refuses, "
        "as it does for decoders; "
        f"on a GPU library, where the mask B T S has no more than {DENSE:,} numbers; chunked everywhere else"
    )
    return {"auto": automatic, **ABOUT}


def _refuses(backend: str, rule: Rule, operands: Operands, part: bool) -> str | None:
    if part and not hasattr(_module(backend), "gradients"):
        return f"positions are split in a ring, and {backend} gives no gradients of a part of the keys"
    return _module(backend).refuses(rule, operands)


def _best(rule: Rule, operands: Operands, part: bool) -> str:
    B, T, S = operands.query_BHTd.shape[0], operands.query_BHTd.shape[2], operands.key_BKSd.shape[2]
    if S < LONG or T == 1:  # small, or a decode step, whose scores are one row
        return "reference"
    preferred = {"tpu": ("library", "flex"), "gpu": ("library",) if B * T * S <= DENSE else ()}.get(platform(), ())
    return next((name for name in preferred if _refuses(name, rule, operands, part) is None), "chunked")


@functools.cache
def say_instead(instead: str, backend: str, reason: str) -> None:
    """Logs once that one backend computes instead of that which was asked for, and why."""
    _log.warning(f"attention: {instead} instead of {backend}: {reason}")


@functools.cache
def _module(name: str):
    """A backend's file, imported when it is first wanted: Pallas takes a second."""
    return importlib.import_module(f"polygpt.attention.kernels.{name}")
