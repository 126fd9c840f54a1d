"""Liveness of the processes of a run: when one dies, the others name it and exit.

XLA has heartbeats too, but on a missed one it aborts with a stack trace that gives at most a number, and a Python
callback in its place aborts as well (std::bad_cast, jax 0.10 and 0.12). Here each process writes heartbeats to the
coordination service and process 0 watches them. A process that finds another one dead, or fails itself, leaves a
verdict for each of the others. A launcher on the same machine is faster: it is the parent of all processes and reports
each death over a pipe as soon as it happens. All of this runs in threads, because the main thread may be blocked in a
collective that never returns. Only when process 0 itself dies can XLA act first; a SIGABRT handler then names it.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from polygpt.errors import UserError

REPORTS = "POLYGPT_REPORTS"
"""Set by `polygpt launch local`: the file descriptor of a pipe on which it reports processes that failed."""

INVALID_INPUT = 2
"""Exit code for invalid input."""

BEATS_PER_BOUND = 10
"""Heartbeats per bound. A process that misses six of them is dead; the seventh at the latest finds out."""

LINGER = 2.0
"""Seconds, one heartbeat at most, that process 0 stays after a verdict: it hosts the service that the others read."""

FOREVER = 10**9
"""Milliseconds, some days. A wait that times out is repeated."""

RESUMES = "stopping; the same command resumes"
"""Ends the message about a process that died. One that failed may fail again."""

FAULT = "fault: "
"""Prefix of a verdict about the user's input: it is printed without host and class, and every process exits with 2."""

COLLECTIVE = (
    "Gloo",
    "NCCL",
    "RCCL",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "Connection",
    "Socket",
    "collective",
)
"""Words in the message of an error that another process caused."""


class Liveness:
    """Sends and watches heartbeats until `close`.

    Args:
        client: client of JAX's coordination service.
        address: address of that service, host:port.
        rank: rank of this process.
        names: names of all processes, by rank.
        bound: seconds within which every process has exited after one died.
        patience: seconds that a failed collective waits to learn which process died; `bound` by default. A launcher
            that ends the processes earlier sets it.
    """

    def __init__(self, client, address: str, rank: int, names: list[str], bound: float, patience: float | None = None):
        self.client, self.address, self.rank, self.names, self.bound = client, address, rank, names, bound
        self.patience = bound if patience is None else min(patience, bound)
        self.answered = time.monotonic()  # when the service accepted the last heartbeat
        self.closing = threading.Event()
        self.ending = threading.Lock()  # only one thread announces the end
        tasks = [self._beat, self._listen] + ([self._watch_the_first] if rank else [])
        self.threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in self.threads:
            thread.start()
        if rank:
            self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self.handler)

    def close(self) -> None:
        """Ends the threads: one that returns from C++ while Python shuts down would abort the process."""
        self.closing.set()
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"polygpt/verdict/{self.rank}", "")
        for thread in self.threads:
            thread.join(self.bound)

    def announce_failure(self, error: BaseException) -> str | None:
        """Tells the others about an error in this process; a failed collective first waits to learn who caused it.

        Returns:
            What to print instead of the error if a collective failed: the library's own text is long and names no
            process. That text goes to the log, on its own line.
        """
        text, said = " ".join(f"{type(error).__name__}: {error}".split()), None
        if isinstance(error, UserError):
            with self.ending:
                self._announce(f"{FAULT}process {self.rank}: {' '.join(str(error).split())}")
            return None
        # A collective's error comes as one of several classes; a connection of this process's own is an OSError.
        foreign = isinstance(error, Exception) and not isinstance(error, OSError)
        if foreign and any(word in text for word in COLLECTIVE):
            self._write(f"INFO a collective failed: {text}")  # INFO: `launch local` writes it to the log only
            self._say(f"a collective failed: waiting up to {self.patience:.0f} s to learn which process ended")
            time.sleep(self.patience)
            text = said = (
                f"a collective failed, and no process was seen to exit within {self.patience:.0f} s: the error is in "
                "the log, and the launcher reports which process exited first"
            )
        with self.ending:
            self._announce(f"{self.names[self.rank]} failed: {text[:500]}: stopping")
        return said

    def peer_died(self, rank: int, code: int, how: str) -> None:
        """The launcher reports that another process has ended with an error; ends this process.

        Args:
            rank: which process ended.
            code: its exit code; negative if a signal killed it.
            how: the same in words, "was killed by SIGKILL".
        """
        if code > 0:  # it may have left a more detailed verdict
            self.closing.wait(LINGER)
        if not self.closing.is_set():
            prefix, ends = (FAULT, "stopping") if code == INVALID_INPUT else ("", RESUMES if code < 0 else "stopping")
            self._end(f"{prefix}{self.names[rank]} {how}: {ends}")

    def _beat(self) -> None:
        count, seen = 0, {}
        while not self.closing.is_set():
            count += 1
            try:
                self.client.key_value_set(f"polygpt/beat/{self.rank}", str(count), allow_overwrite=True)
                beats = self.client.key_value_dir_get("polygpt/beat/") if self.rank == 0 else []
            except Exception as error:
                self._lost(error)
                return
            now = self.answered = time.monotonic()
            beats = {int(key.rpartition("/")[2]): value for key, value in beats}
            for rank in range(len(self.names) if self.rank == 0 else 0):
                value = beats.get(rank)
                if rank not in seen or seen[rank][0] != value:
                    seen[rank] = (value, now)
                elif now - seen[rank][1] > self.bound * 6 / BEATS_PER_BOUND:
                    silent = f"{now - seen[rank][1]:.0f} s"
                    self._end(f"{self.names[rank]} has sent no heartbeat for {silent}: {RESUMES}", announce=True)
            self.closing.wait(self.bound / BEATS_PER_BOUND)

    def _watch_the_first(self) -> None:
        while not self.closing.wait(self.bound / BEATS_PER_BOUND):
            if (silent := time.monotonic() - self.answered) > self.bound * 6 / BEATS_PER_BOUND:
                self._end(f"{self.names[0]}, the coordinator, has sent no heartbeat for {silent:.0f} s: {RESUMES}")

    def _listen(self) -> None:
        verdict = None
        while verdict is None and not self.closing.is_set():
            try:
                verdict = self.client.blocking_key_value_get(f"polygpt/verdict/{self.rank}", FOREVER)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._lost(error)
                    return
        if verdict and not self.closing.is_set():
            self._end(verdict)

    def _aborted(self, number: int) -> None:
        """Runs in the XLA thread that aborts this process as soon as it cannot reach the service."""
        silent = time.monotonic() - self.answered
        if not self.closing.is_set() and (silent > self.bound / 2 or not self._reachable()):
            self._say(f"{self.names[0]}, the coordinator, is gone: {RESUMES}")
            exit_now(1)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), None)  # some other fault: let the abort proceed

    def _reachable(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            return False
        return True

    def _lost(self, error: Exception) -> None:
        """The service cannot be reached: process 0, which hosts it, is gone."""
        if not self.closing.is_set():
            self._end(f"{self.names[0]}, the coordinator, is gone ({str(error).splitlines()[0]}): {RESUMES}")

    def _end(self, why: str, announce: bool = False) -> None:
        with self.ending:
            self._say(why.removeprefix(FAULT))
            if announce:
                self._announce(why)
            elif self.rank == 0:
                time.sleep(min(LINGER, self.bound / BEATS_PER_BOUND))
            exit_now(INVALID_INPUT if why.startswith(FAULT) else 1)

    def _announce(self, why: str) -> None:
        self.closing.set()
        for rank in range(len(self.names)):
            with contextlib.suppress(Exception):  # a verdict exists already
                self.client.key_value_set(f"polygpt/verdict/{rank}", why)
        if self.rank == 0:
            time.sleep(min(LINGER, self.bound / BEATS_PER_BOUND))

    def _say(self, text: str) -> None:
        self._write(f"polygpt: {text}")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def listen_to_launcher(died: Callable[[int, int, str], None]) -> None:
    """Calls `died(rank, code, how)` in a thread for each process that the launcher, if there is one, reports as failed.

    A report is a line "RANK CODE HOW" on the pipe whose descriptor `REPORTS` names.
    """
    given = os.environ.pop(REPORTS, "")  # not for child processes: the descriptor means nothing to them
    if not given.isdecimal():
        return
    os.set_inheritable(int(given), False)

    def read() -> None:
        with open(int(given)) as reports:
            for line in reports:
                rank, code, how = line.rstrip("\n").split(" ", 2)
                died(int(rank), int(code), how)

    threading.Thread(target=read, daemon=True).start()


def exit_now(code: int) -> None:
    """Exits at once, even if other threads are blocked."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
