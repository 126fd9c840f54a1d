"""A run folder is written by one run at a time."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from polygpt.errors import UserError

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None

NAME = ".lock"
"""The file in the run folder that is locked. It stays there and tells who had it last."""


@contextlib.contextmanager
def hold(workdir: Path, remedy: str = "wait for it or choose another --workdir") -> Iterator[None]:
    """While entered, the folder is this run's. However its process ends, the system lets go of the lock.

    Where the file system knows no locks, as some that nodes share, two runs can meet. `remedy` ends the error's text.

    Raises:
        UserError: if another run has the folder.
    """
    with (workdir / NAME).open("a+", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{workdir} is in use by {holder}: {remedy}") from None
        except OSError:  # NFS without its lock service, and others
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} (host {socket.gethostname()})\n")
        file.flush()
        yield
