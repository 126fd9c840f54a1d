"""Messages while processes wait for each other."""

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Iterator

import jax

from polygpt.errors import one_line
from polygpt.runtime.liveness import exit_now

SLOW = 30.0
"""Seconds between messages during a wait."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Deadline:
    """Limit of a wait that can only be ended by exiting the process.

    Attributes:
        seconds: the limit.
        why: message printed on exit.
    """

    seconds: float
    why: str


@contextlib.contextmanager
def report_waiting(what: str, whom=lambda: "", deadline: Deadline | None = None) -> Iterator[None]:
    """Reports a long wait every SLOW seconds, with what it waits for. After the deadline, exits with code 2."""
    done, begun = threading.Event(), time.monotonic()

    def say():
        while not done.wait(
            SLOW if deadline is None else min(SLOW, max(0.0, begun + deadline.seconds - time.monotonic()))
        ):
            if deadline and time.monotonic() >= begun + deadline.seconds:
                print(f"polygpt: {deadline.why}", file=sys.stderr, flush=True)
                exit_now(2)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                log.warning("%s", f"{what} {whom()} after {time.monotonic() - begun:.0f} s".replace("  ", " "))

    speaker = threading.Thread(target=say, daemon=True)
    with contextlib.suppress(RuntimeError):  # Python 3.12 cannot start threads at shutdown
        speaker.start()
    try:
        yield
    finally:
        done.set()
        if speaker.is_alive():
            speaker.join()


class _Lines(logging.Handler):
    """Prints log-only lines with level and time, and warnings like other messages."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        aside = f"{record.levelname} {time.strftime('%H:%M:%S')} {text}"
        line = aside if record.levelno < logging.WARNING else one_line(text)
        print(f"{line}\n", end="", file=sys.stderr, flush=True)  # in one write, so that threads do not mix lines


def log_to_stderr() -> None:
    """Shows this package's log lines, regardless of other loggers' levels."""
    logger = logging.getLogger("polygpt.runtime")
    if not logger.handlers:
        logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)
        logger.propagate = False
