"""What a person is told while processes wait for each other."""

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Iterator

import jax

from polygpt.errors import one_line
from polygpt.runtime.liveness import leave

SLOW = 30.0
"""Seconds of waiting after which it is said, and said again."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Bound:
    """How long something may be waited for that cannot be given up but with the process.

    Attributes:
        seconds: at most.
        why: what is said then.
    """

    seconds: float
    why: str


@contextlib.contextmanager
def saying(what: str, whom=lambda: "", bound: Bound | None = None) -> Iterator[None]:
    """Says every SLOW seconds that this takes long, and whom it waits for; beyond a bound the process ends, code 2."""
    done, begun = threading.Event(), time.monotonic()

    def say():
        while not done.wait(SLOW if bound is None else min(SLOW, max(0.0, begun + bound.seconds - time.monotonic()))):
            if bound and time.monotonic() >= begun + bound.seconds:
                print(f"polygpt: {bound.why}", file=sys.stderr, flush=True)
                leave(2)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                log.warning("%s", f"{what} {whom()} after {time.monotonic() - begun:.0f} s".replace("  ", " "))

    speaker = threading.Thread(target=say, daemon=True)
    with contextlib.suppress(RuntimeError):  # Python 3.12 starts no thread at its end
        speaker.start()
    try:
        yield
    finally:
        done.set()
        if speaker.is_alive():
            speaker.join()


class _Lines(logging.Handler):
    """What is for the log alone with its time, and warnings as every other line for a person."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        aside = f"{record.levelname} {time.strftime('%H:%M:%S')} {text}"
        line = aside if record.levelno < logging.WARNING else one_line(text)
        print(f"{line}\n", end="", file=sys.stderr, flush=True)  # whole, beside what other threads print


def log_to_stderr() -> None:
    """Lets this package's lines be seen, whatever the level of others."""
    logger = logging.getLogger("polygpt.runtime")
    if not logger.handlers:
        logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)
        logger.propagate = False
