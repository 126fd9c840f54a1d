"""Runs one command in several processes on this machine: starts, logs and ends them together."""

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
from polygpt.runtime.liveness import INVALID_INPUT, REPORTS
from polygpt.runtime.processes import COORDINATOR, GRACE, PROCESS, PROCESSES

PROGRAM = (sys.executable, "-m", "polygpt.cli.main")
"""The program that runs the command."""

ESCALATION = (signal.SIGTERM, signal.SIGKILL)
"""Signals that the launcher sends to processes that outlive their grace period, in this order."""

CHILD_PRELUDE = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("polygpt: launch: the launcher has exited")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Runs in each process before the command replaces it: asks Linux for SIGTERM when the launcher exits, even if it is
killed. It is a program of its own because the launcher has threads and must not run Python between fork and exec."""

LOG_ONLY = (b"INFO ", b"[Gloo] ")
"""Prefixes of lines of process 0 that go to its log alone: barriers, and connections between processes."""

RELAYED = re.compile(rb"polygpt: process (\d+): ")
"""Prefix of a line in which a process repeats the error of another."""


@dataclasses.dataclass(frozen=True)
class LaunchResult:
    """The result of `run`.

    Attributes:
        exit_codes: exit codes by rank; -N if signal N killed the process.
        cause: the process that ended the run and how, None if every process succeeded.
        stopped: whether the launcher received a signal to stop.
    """

    exit_codes: tuple[int, ...]
    cause: str | None
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Child:
    """One process of the run, and the pipe that tells it about failures of the others."""

    process: subprocess.Popen
    reports: int

    @property
    def code(self) -> int | None:
        """The exit code, None while the process runs."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Sends a signal if the process runs."""
        if self.code is None:
            self.process.send_signal(number)

    def report(self, rank: int, code: int) -> None:
        """Reports that process `rank` failed (`liveness.listen_to_launcher`). Does nothing if this one has exited."""
        with contextlib.suppress(OSError):
            os.write(self.reports, f"{rank} {code} {describe_exit(code)}\n".encode())

    def close(self) -> None:
        """Kills the process if it still runs."""
        self.signal(signal.SIGKILL)
        os.close(self.reports)


def run(
    command: Sequence[str],
    count: int,
    devices: int,
    logs: Path,
    grace: float = 20.0,
    program: Sequence[str] = PROGRAM,
) -> LaunchResult:
    """Runs `command` in `count` processes that form one run, until the last one has exited.

    Prints what process 0 prints, and warnings and errors of the others. Each process has a log file, where every line
    begins with its rank. Forwards SIGINT and SIGTERM, and SIGHUP as SIGTERM. When one process fails, the launcher
    reports it to the others, which have `grace` seconds to exit. When the launcher is killed, they get SIGTERM (on
    Linux).

    Args:
        command: arguments of `program`.
        count: number of processes.
        devices: devices per process: CPU devices, or GPUs of this machine.
        logs: folder of p0.log, p1.log, ...
        grace: seconds.
        program: the program and its first arguments.

    Raises:
        UserError: the folder cannot be written, there are too few GPUs, or a process cannot be started.
    """
    port = _free_port()
    shared = os.environ | {GRACE: f"{grace:g}"}
    environments = [shared | environment(rank, count, devices, port) for rank in range(count)]
    try:
        logs.mkdir(parents=True, exist_ok=True)
        files = [(logs / f"p{rank}.log").open("ab", buffering=0) for rank in range(count)]
    except OSError as error:
        raise UserError(f"cannot write logs to {logs}: {error.strerror}: choose another --logs") from error
    children: list[Child] = []
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file)
        signals = stack.enter_context(_forwarding(children))
        for rank, variables in enumerate(environments):
            children.append(_start([*program, *command], rank, variables))
            stack.callback(children[-1].close)
        for number in signals:  # a child that was started after the signal has not received it
            _signal(children, number)
        listeners, seen = [], {}
        for rank, (child, file) in enumerate(zip(children, files, strict=True)):
            process = child.process
            file.write(f"--- {time.strftime('%F %T')} pid {process.pid}: {shlex.join(command)}\n".encode())
            for pipe, terminal in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                listeners.append(threading.Thread(target=_listen, args=(rank, pipe, file, terminal, seen), daemon=True))
                listeners[-1].start()
        first = _wait(children, grace, signals)
        for listener in listeners:
            listener.join(5)  # a grandchild may keep the pipe open
    exit_codes = tuple(child.process.returncode for child in children)
    failed = [rank for rank in range(count) if exit_codes[rank]]
    # A process that was killed, or reports a fault of its input, is the cause; the others exited because of it.
    failed.sort(
        key=lambda rank: (exit_codes[rank] != INVALID_INPUT, rank != first) if exit_codes[first] >= 0 else rank != first
    )
    cause = f"process {failed[0]} {describe_exit(exit_codes[failed[0]])}" if failed else None
    return LaunchResult(exit_codes, cause, bool(signals))


def environment(rank: int, count: int, devices: int, port: int) -> Mapping[str, str]:
    """Environment variables of one process of the run, added to the launcher's. Raises UserError as `gpus` does."""
    return {
        COORDINATOR: f"127.0.0.1:{port}",
        PROCESSES: str(count),
        PROCESS: str(rank),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # the default is every interface of the machine
        "JAX_NUM_CPU_DEVICES": str(devices),
        "CUDA_VISIBLE_DEVICES": gpus(rank, count, devices),
        "PYTHONUNBUFFERED": "1",
    }


def gpus(rank: int, count: int, devices: int) -> str:
    """CUDA_VISIBLE_DEVICES of one of `count` processes on a machine: `devices` of the visible GPUs each, in order.

    Raises:
        UserError: fewer are visible than the processes need, unless none is visible or JAX is to use the CPU.
    """
    mine = slice(rank * devices, (rank + 1) * devices)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return ",".join(map(str, range(count * devices)[mine]))
    # CUDA ignores everything from the first empty or negative entry on.
    visible = list(itertools.takewhile(lambda name: name.strip() and not name.startswith("-"), given.split(",")))
    if 0 < len(visible) < count * devices and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise UserError(
            f"{count} processes with {devices} GPUs each need {count * devices}, but CUDA_VISIBLE_DEVICES is "
            f"{given!r}: start fewer processes, or set JAX_PLATFORMS=cpu"
        )
    return ",".join(visible[mine])


def describe_exit(code: int) -> str:
    """An exit code as text, such as "was killed by SIGKILL"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(words: Sequence[str], rank: int, variables: Mapping[str, str]) -> Child:
    theirs, ours = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-Sc", CHILD_PRELUDE, str(os.getpid()), *words],
            env={**variables, REPORTS: str(theirs)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(theirs,),
            start_new_session=True,  # Ctrl-C reaches the process once, through the launcher
        )
    except OSError as error:
        os.close(ours)
        raise UserError(f"process {rank} cannot be started: {error.strerror}: start fewer, or free memory") from error
    finally:
        os.close(theirs)
    return Child(process, ours)


def _listen(rank: int, pipe, file, terminal, seen: dict[bytes, int]) -> None:
    """Copies lines to the log, and some to the terminal. A line that several processes print is shown once: `seen`
    maps it to the process that printed it first."""
    for line in pipe:  # until the end, even if nothing can be written: a full pipe would block the process
        with contextlib.suppress(OSError):
            file.write(f"[p{rank}] ".encode() + line)
        if rank == 0 and not line.startswith(LOG_ONLY) or line.startswith(b"polygpt: "):
            relayed = RELAYED.match(line)
            speaker, line = (int(relayed[1]), b"polygpt: " + line[relayed.end() :]) if relayed else (rank, line)
            if line.startswith(b"polygpt: ") and seen.setdefault(line, rank) != rank:
                continue
            text = line.decode(errors="replace")
            with contextlib.suppress(OSError):
                print(text if speaker == 0 else f"[p{speaker}] {text}", end="", file=terminal, flush=True)


@contextlib.contextmanager
def _forwarding(children: Sequence[Child]) -> Iterator[list[int]]:
    """Forwards signals to the children, which may grow in number; yields the list of the signals sent."""
    signals: list[int] = []

    def handle(number, _):
        # SIGTERM for SIGHUP: a run saves on SIGTERM, but SIGHUP would kill it.
        signals.append(signal.SIGTERM if number == signal.SIGHUP else number)
        _signal(children, signals[-1])

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        handled.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in handled if in_main_thread}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[Child], grace: float, signals: Sequence[int]) -> int:
    """Waits until all have exited, and ends those that outlive the grace period after a failure.

    Returns:
        The rank of the first process that failed, 0 if none did.
    """
    first, deadline, left = None, None, list(ESCALATION)
    while None in [child.code for child in children]:
        if first is None and (failed := _failed(children)):
            first, deadline = failed[0], time.monotonic() + grace
            code = children[first].code
            if not signals and code != INVALID_INPUT:
                _report(f"process {first} {describe_exit(code)}: the others have {grace:.0f} s to exit")
            if not signals or code < 0 and -code not in signals:  # processes that were asked to stop exit one by one
                for child in children:
                    child.report(first, code)
        if deadline is not None and time.monotonic() > deadline and left:
            number = left.pop(0)
            alive = [rank for rank, child in enumerate(children) if child.code is None]
            _report(f"{number.name} to process {', '.join(map(str, alive))}")
            _signal(children, number)
            deadline = time.monotonic() + grace / 2
        time.sleep(0.02)
    return first if first is not None else next(iter(_failed(children)), 0)


def _failed(children: Sequence[Child]) -> list[int]:
    """Ranks of the processes that failed, those that were killed first."""
    failed = [rank for rank, child in enumerate(children) if child.process.returncode]
    return sorted(failed, key=lambda rank: children[rank].process.returncode)


def _signal(children: Sequence[Child], number: int) -> None:
    for child in children:
        child.signal(number)


def _report(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"polygpt: launch: {text}", file=sys.stderr, flush=True)
