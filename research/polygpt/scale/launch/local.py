"""n processes of one command on this machine: started together, heard together, ended together."""

import contextlib
import dataclasses
import itertools
import os
import re
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
from polygpt.runtime.processes import COORDINATOR, GRACE, PROCESS, PROCESSES

PROGRAM = (sys.executable, "-m", "polygpt.cli.main")
"""What the words of a command are given to."""

OURS = (signal.SIGTERM, signal.SIGKILL)
"""What the launcher itself ends processes with, in this order."""

BOUND = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("polygpt: launch: the launcher has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""What a process is before it becomes the command: it asks Linux for SIGTERM when the launcher ends, even if killed. A
program of its own, because the launcher has threads and may run no Python between fork and exec."""

UNHEARD = (b"INFO ", b"[Gloo] ")
"""Beginnings of lines of process 0 that are for its log alone: barriers, and connections between processes."""


TOLD = re.compile(rb"polygpt: process (\d+): ")
"""Begins a line in which a process passes on the words of another."""
AT_FAULT = 2
"""The code of a process whose input is at fault; it has said so, and all that is left is to end."""


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
    process in front, is added to a file a process. SIGINT and SIGTERM are passed on, and SIGHUP as SIGTERM. When one
    process fails, the others have `grace` seconds to end. When the launcher is killed, they get SIGTERM (on Linux).

    Args:
        command: words after `program`.
        count, devices: how many processes, and devices for each: CPU devices, or that many of the machine's GPUs.
        logs: the folder of p0.log, p1.log, ...
        grace: seconds.
        program: the words in front.

    Raises:
        UserError: if the folder cannot be written, there are too few GPUs or a process cannot be started.
    """
    port = _free_port()
    told = os.environ | {GRACE: f"{grace:g}"}
    environments = [told | environment(rank, count, devices, port) for rank in range(count)]
    try:
        logs.mkdir(parents=True, exist_ok=True)
        files = [(logs / f"p{rank}.log").open("ab", buffering=0) for rank in range(count)]
    except OSError as error:
        raise UserError(f"cannot write logs to {logs}: {error.strerror}: choose another --logs") from error
    processes: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file)
        stack.callback(lambda: [process.kill() for process in processes if process.poll() is None])
        asked = stack.enter_context(_passing_on(processes))
        for rank, variables in enumerate(environments):
            processes.append(_start([*program, *command], rank, variables))
        for number in asked:  # those that were started after it came have not got it
            _signal(processes, number)
        listeners, heard = [], {}
        for rank, (process, file) in enumerate(zip(processes, files, strict=True)):
            file.write(f"--- {time.strftime('%F %T')} pid {process.pid}: {shlex.join(command)}\n".encode())
            for pipe, terminal in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                listeners.append(
                    threading.Thread(target=_listen, args=(rank, pipe, file, terminal, heard), daemon=True)
                )
                listeners[-1].start()
        first = _wait(processes, grace, asked)
        for listener in listeners:
            listener.join(5)  # a grandchild may hold the pipe open
    codes = tuple(process.returncode for process in processes)
    failed = [rank for rank in range(count) if codes[rank]]
    # A process that was killed, or says that its input is at fault, is the cause; the others ended because of it.
    failed.sort(key=lambda rank: (codes[rank] != AT_FAULT, rank != first) if codes[first] >= 0 else rank != first)
    cause = describe(failed[0], codes[failed[0]]) if failed else None
    return Outcome(codes, cause, bool(asked))


def environment(rank: int, count: int, devices: int, port: int) -> Mapping[str, str]:
    """The variables that a process of the run needs beside those that are there. Raises UserError as `gpus` does."""
    return {
        COORDINATOR: f"127.0.0.1:{port}",
        PROCESSES: str(count),
        PROCESS: str(rank),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # by default every interface of the machine
        "JAX_NUM_CPU_DEVICES": str(devices),
        "CUDA_VISIBLE_DEVICES": gpus(rank, count, devices),
        "PYTHONUNBUFFERED": "1",
    }


def gpus(rank: int, count: int, devices: int) -> str:
    """CUDA_VISIBLE_DEVICES of one of `count` processes on a machine: `devices` of what is visible here, in order.

    Raises:
        UserError: if fewer are visible than the processes need, unless none is or JAX is to use the CPU.
    """
    mine = slice(rank * devices, (rank + 1) * devices)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return ",".join(map(str, range(count * devices)[mine]))
    # As CUDA reads it: what follows an empty or a negative entry is not visible.
    visible = list(itertools.takewhile(lambda name: name.strip() and not name.startswith("-"), given.split(",")))
    if 0 < len(visible) < count * devices and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise UserError(
            f"{count} processes with {devices} of the GPUs each need {count * devices}, and CUDA_VISIBLE_DEVICES is "
            f"{given!r}: start fewer processes, or set JAX_PLATFORMS=cpu"
        )
    return ",".join(visible[mine])


def describe(rank: int, code: int) -> str:
    """How a process ended, for a person."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"process {rank} {how}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(words: Sequence[str], rank: int, variables: Mapping[str, str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(
            [sys.executable, "-Sc", BOUND, str(os.getpid()), *words],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches them through this process alone, and so once
        )
    except OSError as error:
        raise UserError(f"process {rank} cannot be started: {error.strerror}: start fewer, or free memory") from error


def _listen(rank: int, pipe, file, terminal, heard: dict[bytes, int]) -> None:
    """Copies lines to the file, and some to the terminal; what several processes say is `heard` of the first alone."""
    for line in pipe:  # to its end, whatever cannot be written: a process waits while its pipe is full
        with contextlib.suppress(OSError):
            file.write(f"[p{rank}] ".encode() + line)
        if rank == 0 and not line.startswith(UNHEARD) or line.startswith(b"polygpt: "):
            told = TOLD.match(line)
            speaker, line = (int(told[1]), b"polygpt: " + line[told.end() :]) if told else (rank, line)
            if line.startswith(b"polygpt: ") and heard.setdefault(line, rank) != rank:
                continue
            text = line.decode(errors="replace")
            with contextlib.suppress(OSError):
                print(text if speaker == 0 else f"[p{speaker}] {text}", end="", file=terminal, flush=True)


@contextlib.contextmanager
def _passing_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """While entered, signals go to the processes, `processes` growing as it may; gives the list of those that came."""
    asked: list[int] = []

    def handle(number, _):
        # SIGTERM for SIGHUP: a run saves at the one, and is ended at once by the other.
        asked.append(signal.SIGTERM if number == signal.SIGHUP else number)
        _signal(processes, asked[-1])

    here = threading.current_thread() is threading.main_thread()
    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in heard if here}
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
            if not asked and processes[first].returncode != AT_FAULT:
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
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"polygpt: launch: {text}", file=sys.stderr, flush=True)
