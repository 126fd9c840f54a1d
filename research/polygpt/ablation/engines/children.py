"""Child processes on this machine, each with a share of its resources; they end with this process."""

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

from polygpt.scale.launch.local import describe_exit, gpus

GRACE = 30.0
"""Seconds that a process has to save and exit before it is killed."""
MEMORY = 0.9
"""Fraction of a GPU's memory that all processes on it may use together."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's share of the machine.

    Attributes:
        environment: environment variables to set.
        cores: cores to run on; empty for all.
    """

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: tuple[int, ...] = ()


def start(words: Sequence[str], share: Share = Share(), log: Path | None = None) -> subprocess.Popen:
    """Starts this Python interpreter with arguments; stdin and stdout are pipes, stderr is appended to `log`."""
    # Same module path. A new session, so that Ctrl-C reaches the child only once, through this process.
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
        with contextlib.suppress(ProcessLookupError):  # it has exited; the caller will notice
            os.sched_setaffinity(child.pid, share.cores)  # before it chooses its number of threads
    return child


@contextlib.contextmanager
def terminated_on_exit(children: Iterable[subprocess.Popen], grace: float = GRACE) -> Iterator[None]:
    """On exit, ends all children: first asks them to stop, then kills them."""
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
        finally:  # also on a second Ctrl-C while they save
            for child in alive:
                if child.poll() is None:
                    child.kill()
                child.wait()


def describe_failure(code: int) -> str:
    """Describes how a worker process ended, with the likely cause of SIGKILL."""
    more = ": possibly too little memory for this many workers" if -code == signal.SIGKILL else ""
    return f"{describe_exit(code)}{more}"


def count_gpus() -> int:
    """Number of visible NVIDIA GPUs. Does not ask JAX, which would allocate their memory."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and not name.startswith("-")])
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def cores() -> tuple[int, ...]:
    """Cores that this process may run on; empty if the system does not tell (macOS)."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def shares(count: int) -> list[Share]:
    """Shares for `count` processes, which divide the machine's GPUs or, without GPUs, its cores.

    With fewer GPUs than processes, several processes share a GPU and divide its memory. Cores are divided because small
    programs gain little from a second core and contend for shared ones. With more processes than cores the system
    decides.
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
