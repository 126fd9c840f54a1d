"""Processes of this machine that work for this one: each with its share of the devices; they end when it ends."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from polygpt.scale.launch.local import gpus

GRACE = 30.0
"""Seconds that a process has to save and end when it is asked to, before it is killed."""
MEMORY = 0.9
"""The share of a GPU's memory that the processes on it take together."""


def start(words: Sequence[str], share: Mapping[str, str], log: Path | None = None) -> subprocess.Popen:
    """Starts this Python with words; stdin and stdout are pipes. What is printed to stderr is added to `log`."""
    # The modules that this process finds, it finds; Ctrl-C reaches it through this process alone, and so once.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | share
    with contextlib.ExitStack() as stack:
        errors = subprocess.DEVNULL if log is None else stack.enter_context(log.open("ab"))
        return subprocess.Popen(
            [sys.executable, *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )


@contextlib.contextmanager
def ended(children: Iterable[subprocess.Popen], grace: float = GRACE) -> Iterator[None]:
    """However it is left, the children (those that are among them then) have ended: first asked to, then killed."""
    try:
        yield
    finally:
        alive = [child for child in children if child.poll() is None]
        for child in alive:
            child.terminate()
        try:
            deadline = time.monotonic() + grace
            while any(child.poll() is None for child in alive) and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:  # a second Ctrl-C while they are saving
            for child in alive:
                if child.poll() is None:
                    child.kill()
                child.wait()


def how(code: int) -> str:
    """How a process ended, for a person."""
    if code >= 0:
        return f"ended with code {code}"
    more = ": perhaps there was too little memory for so many workers" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{more}"


def count_gpus() -> int:
    """How many NVIDIA GPUs processes of this machine may use; JAX is not asked, which would take their memory."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and not name.startswith("-")])
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def shares(count: int) -> list[dict[str, str]]:
    """What each of `count` processes is to find in its environment, so that they divide the machine's GPUs.

    Of fewer GPUs than processes each is shared by several, which divide its memory.
    """
    there = count_gpus()
    if not there or count == 1:
        return [{}] * count
    if there >= count:
        return [{"CUDA_VISIBLE_DEVICES": gpus(rank, count, there // count)} for rank in range(count)]
    fraction = f"{MEMORY / math.ceil(count / there):.3f}"
    one = [{"CUDA_VISIBLE_DEVICES": gpus(rank % there, there, 1)} for rank in range(count)]
    return [share | {"XLA_PYTHON_CLIENT_MEM_FRACTION": fraction} for share in one]
