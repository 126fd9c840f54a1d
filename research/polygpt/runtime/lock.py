"""Locks a run folder, so that only one run writes to it at a time."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from polygpt.errors import UserError

try:
    import fcntl
except ImportError:  # not available on this system
    fcntl = None

NAME = ".lock"
"""The locked file in the run folder. It persists and names the last holder."""


@contextlib.contextmanager
def hold(workdir: Path, remedy: str = "wait for it or choose another --workdir") -> Iterator[None]:
    """Context manager: holds the lock. The system releases it however the process ends.

    Some shared file systems have no locks; there, two runs can collide. `remedy` ends the error message.

    Raises:
        UserError: another run holds the lock.
    """
    with (workdir / NAME).open("a+", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{workdir} is in use by {holder}: {remedy}") from None
        except OSError:  # e.g. NFS without a lock service
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} (host {socket.gethostname()})\n")
        file.flush()
        yield
