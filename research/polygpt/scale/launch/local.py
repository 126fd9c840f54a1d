"""n processes of one command on this machine: started together, heard together, ended together."""

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from polygpt.errors import UserError
from polygpt.training.processes import COORDINATOR, PROCESS, PROCESSES

PROGRAM = (sys.executable, "-m", "polygpt.cli.main")
"""What the words of a command are given to."""

OURS = (signal.SIGTERM, signal.SIGKILL)
"""What the launcher itself ends processes with, in this order."""

UNHEARD = (b"INFO ", b"[Gloo] ")
"""Beginnings of lines of process 0 that are for its log alone: barriers, and connections between processes."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the processes ended.

    Attributes:
        codes: by rank; negative is the number of a signal.
        cause: what ended the run, None if every process ended well.
        ours: whether the launcher was asked to stop.
    """

    codes: tuple[int, ...]
    cause: str | None
    ours: bool


def run(
    command: Sequence[str],
    count: int,
    devices: int,
    logs: Path,
    grace: float = 20.0,
    program: Sequence[str] = PROGRAM,
) -> Outcome:
    """Runs `command` in `count` processes that find each other, until the last one has ended.

    What process 0 prints is printed here, and the warnings and errors of the others; everything, each line with its
    process in front, is added to a file a process. SIGINT and SIGTERM are passed on. When one process fails, the others
    have `grace` seconds to end.

    Args:
        command: words after `program`.
        count, devices: how many processes, and devices for each: CPU devices, or that many of the machine's GPUs.
        logs: the folder of p0.log, p1.log, ...
        grace: seconds.
        program: the words in front.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
        files = [(logs / f"p{rank}.log").open("ab", buffering=0) for rank in range(count)]
    except OSError as error:
        raise UserError(f"cannot write logs to {logs}: {error.strerror}: choose another --logs") from error
    port = _free_port()
    with contextlib.ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [*program, *command],
                env=os.environ | environment(rank, count, devices, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches them through this process alone, and so once
            )
            for rank, _ in enumerate(stack.enter_context(file) for file in files)
        ]
        stack.callback(lambda: [process.kill() for process in processes if process.poll() is None])
        listeners = []
        for rank, (process, file) in enumerate(zip(processes, files, strict=True)):
            file.write(f"--- {time.strftime('%F %T')} pid {process.pid}: {shlex.join(command)}\n".encode())
            for pipe, terminal in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                listeners.append(threading.Thread(target=_listen, args=(rank, pipe, file, terminal), daemon=True))
                listeners[-1].start()
        with _passing_on(processes) as asked:
            first = _wait(processes, grace, asked)
        for listener in listeners:
            listener.join(5)  # a grandchild may hold the pipe open
    codes = tuple(process.returncode for process in processes)
    failed = [rank for rank in range(count) if codes[rank]]
    # A process that was killed, or says that its input is at fault, is the cause; the others ended because of it.
    failed.sort(key=lambda rank: (codes[rank] != 2, rank != first) if codes[first] >= 0 else rank != first)
    cause = describe(failed[0], codes[failed[0]]) if failed else None
    return Outcome(codes, cause, bool(asked))


def environment(rank: int, count: int, devices: int, port: int) -> Mapping[str, str]:
    """The variables that a process of the run needs beside those that are there."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    mine = range(rank * devices, (rank + 1) * devices)
    return {
        COORDINATOR: f"127.0.0.1:{port}",
        PROCESSES: str(count),
        PROCESS: str(rank),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # by default every interface of the machine
        "JAX_NUM_CPU_DEVICES": str(devices),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus[i] if any(gpus) and i < len(gpus) else str(i) for i in mine),
        "PYTHONUNBUFFERED": "1",
    }


def describe(rank: int, code: int) -> str:
    """How a process ended, for a person."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"process {rank} {how}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listen(rank: int, pipe, file, terminal) -> None:
    for line in pipe:
        file.write(f"[p{rank}] ".encode() + line)
        if rank == 0 and not line.startswith(UNHEARD) or line.startswith((b"polygpt: ", b"WARNING ")):
            text = line.decode(errors="replace")
            print(text if rank == 0 else f"[p{rank}] {text}", end="", file=terminal, flush=True)


@contextlib.contextmanager
def _passing_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """While entered, SIGINT and SIGTERM go to the processes; gives the list of those that came."""
    asked: list[int] = []

    def handle(number, _):
        asked.append(number)
        _signal(processes, number)

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen], grace: float, asked: Sequence[int]) -> int:
    """Until all have ended. Gives the first that failed, 0 if none did; after it the others are ended too."""
    first, deadline, left = None, None, list(OURS)
    while None in [process.poll() for process in processes]:
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed and first is None:
            first = min(failed, key=lambda rank: processes[rank].returncode)  # signals before codes
            deadline = time.monotonic() + grace
            if not asked:
                _say(f"{describe(first, processes[first].returncode)}: the others have {grace:.0f} s to end")
        if deadline is not None and time.monotonic() > deadline and left:
            number = left.pop(0)
            alive = [rank for rank, process in enumerate(processes) if process.poll() is None]
            _say(f"{number.name} to process {', '.join(map(str, alive))}")
            _signal(processes, number)
            deadline = time.monotonic() + grace / 2
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    return first if first is not None else min(failed, key=lambda rank: processes[rank].returncode, default=0)


def _signal(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _say(text: str) -> None:
    print(f"polygpt: launch: {text}", file=sys.stderr, flush=True)
