"""Processes of this machine that work for this one: each with its share of it; they end when it ends."""

import contextlib
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of the machine.

    Attributes:
        environment: variables that it is to find.
        cores: that it may run on; empty for all.
    """

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: tuple[int, ...] = ()


def start(words: Sequence[str], share: Share = Share(), log: Path | None = None) -> subprocess.Popen:
    """Starts this Python with words; stdin and stdout are pipes. What is printed to stderr is added to `log`."""
    # The modules that this process finds, it finds; Ctrl-C reaches it through this process alone, and so once.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | share.environment
    with contextlib.ExitStack() as stack:
        errors = subprocess.DEVNULL if log is None else stack.enter_context(log.open("ab"))
        child = subprocess.Popen(
            [sys.executable, *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
    if share.cores:
        with contextlib.suppress(ProcessLookupError):  # it has ended: whoever waits for it will see
            os.sched_setaffinity(child.pid, share.cores)  # long before it asks how many threads it may have
    return child


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


def cores() -> tuple[int, ...]:
    """The cores that this process may run on; none where the system does not say, as macOS."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def shares(count: int) -> list[Share]:
    """What each of `count` processes is to have, so that they divide the machine's GPUs, or without any its cores.

    Of fewer GPUs than processes each is shared by several, which divide its memory. Cores are divided because a small
    program gains little from a second one, and two that share both wait for each other; with more processes than cores
    they are left to the system.
    """
    there, mine = count_gpus(), cores()
    if count <= 1:
        return [Share()] * count
    if not there:
        each = len(mine) // count
        return [Share(cores=mine[rank * each : (rank + 1) * each]) for rank in range(count)]
    if there >= count:
        return [Share({"CUDA_VISIBLE_DEVICES": gpus(rank, count, there // count)}) for rank in range(count)]
    fraction = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY / math.ceil(count / there):.3f}"}
    return [Share({"CUDA_VISIBLE_DEVICES": gpus(rank % there, there, 1)} | fraction) for rank in range(count)]
