"""Who of several processes is alive: when one dies, the others say which one and end.

XLA has heartbeats too. On a missed one it aborts with a stack trace that names a number at best, and a callback of
Python's in its place aborts as well (std::bad_cast, jax 0.10 and 0.12). So here each process writes a beat to the
coordination service, process 0 watches the beats, and whoever finds a process dead, or fails itself, leaves a verdict
for each of the others. All of it happens in threads: the main one may be stuck in a collective that never ends. Only
when process 0 itself dies is XLA first; then a handler of the abort's signal says whose end it was.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time

from polygpt.errors import UserError

BEATS = 10
"""Beats within the bound. Silence over six of them is death: it is seen by the seventh at most, and told at once."""

FAREWELL = 2.0
"""Seconds, a beat at most, that process 0 stays after a verdict: the service, which the others read it from, is its."""

FOREVER = 10**9
"""Milliseconds, some days; a wait that ends sooner is begun again."""

RESUMES = "stopping; the same command resumes"
"""Said where a process has died. One that failed may fail again."""

FAULT = "fault: "
"""Begins a verdict of the user's fault: it is said as it is, without host and class, and all end with code 2."""

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
"""Words in the message of an error that is another process's doing."""


class Liveness:
    """Beats and watches from its making to `close`.

    Args:
        client: of JAX's coordination service.
        address: of that service, host:port.
        rank: this process's.
        names: of all processes, by rank.
        bound: seconds within which all have ended when one has died.
        patience: seconds for which an error of a collective waits to learn whose end it was; `bound` by default. A
            launcher that ends processes earlier sets it.
    """

    def __init__(self, client, address: str, rank: int, names: list[str], bound: float, patience: float | None = None):
        self.client, self.address, self.rank, self.names, self.bound = client, address, rank, names, bound
        self.patience = bound if patience is None else min(patience, bound)
        self.answered = time.monotonic()  # when the service took the last beat
        self.closing = threading.Event()
        self.ending = threading.Lock()  # one thread tells the end, once
        tasks = [self._beat, self._listen] + ([self._watch_the_first] if rank else [])
        self.threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in self.threads:
            thread.start()
        if rank:
            self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self.handler)

    def close(self) -> None:
        """Ends the threads: one that came back from C++ while Python shuts down would abort the process."""
        self.closing.set()
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"polygpt/verdict/{self.rank}", "")
        for thread in self.threads:
            thread.join(self.bound)

    def fail(self, error: BaseException) -> str | None:
        """Tells the others of an error in this process; one of a collective waits to be told whose fault it is.

        Returns:
            What to say in place of the error, where it is a collective's: the library's own text is long and names no
            process. It is in the log, on a line of its own.
        """
        text, said = " ".join(f"{type(error).__name__}: {error}".split()), None
        if isinstance(error, UserError):
            with self.ending:
                self._tell(f"{FAULT}process {self.rank}: {' '.join(str(error).split())}")
            return None
        # A collective's error comes as one of several classes; a connection of this process's own is an OSError.
        foreign = isinstance(error, Exception) and not isinstance(error, OSError)
        if foreign and any(word in text for word in COLLECTIVE):
            self._write(f"INFO a collective failed: {text}")  # INFO: `launch local` leaves it to the log
            self._say(f"a collective failed: waiting up to {self.patience:.0f} s to learn which process ended")
            time.sleep(self.patience)
            text = said = (
                f"a collective failed, and no process was heard to end within {self.patience:.0f} s: its error is in "
                "the log, and the launcher says which process ended first"
            )
        with self.ending:
            self._tell(f"{self.names[self.rank]} failed: {text[:500]}: stopping")
        return said

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
                elif now - seen[rank][1] > self.bound * 6 / BEATS:
                    silent = f"{now - seen[rank][1]:.0f} s"
                    self._end(f"{self.names[rank]} has not been heard of for {silent}: {RESUMES}", tell=True)
            self.closing.wait(self.bound / BEATS)

    def _watch_the_first(self) -> None:
        while not self.closing.wait(self.bound / BEATS):
            if (silent := time.monotonic() - self.answered) > self.bound * 6 / BEATS:
                self._end(f"{self.names[0]}, which coordinates, has not been heard of for {silent:.0f} s: {RESUMES}")

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
        """In the thread of XLA that aborts this process, which it does as soon as it cannot reach the service."""
        silent = time.monotonic() - self.answered
        if not self.closing.is_set() and (silent > self.bound / 2 or not self._reachable()):
            self._say(f"{self.names[0]}, which coordinates, is gone: {RESUMES}")
            leave(1)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), None)  # the default: some other fault, and the abort goes on

    def _reachable(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            return False
        return True

    def _lost(self, error: Exception) -> None:
        """The service cannot be reached: its host, process 0, is gone."""
        if not self.closing.is_set():
            self._end(f"{self.names[0]}, which coordinates, is gone ({str(error).splitlines()[0]}): {RESUMES}")

    def _end(self, why: str, tell: bool = False) -> None:
        with self.ending:
            self._say(why.removeprefix(FAULT))
            if tell:
                self._tell(why)
            elif self.rank == 0:
                time.sleep(min(FAREWELL, self.bound / BEATS))
            leave(2 if why.startswith(FAULT) else 1)

    def _tell(self, why: str) -> None:
        self.closing.set()
        for rank in range(len(self.names)):
            with contextlib.suppress(Exception):  # a verdict stands already
                self.client.key_value_set(f"polygpt/verdict/{rank}", why)
        if self.rank == 0:
            time.sleep(min(FAREWELL, self.bound / BEATS))

    def _say(self, text: str) -> None:
        self._write(f"polygpt: {text}")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def leave(code: int) -> None:
    """Ends this process at once, whatever its other threads are stuck in."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
