"""Turns operating-system errors about unwritable paths into UserErrors with a remedy."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from polygpt.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EFBIG: "raise the limit on file sizes and run the same command again",
    errno.EIO: "check the disk and run the same command again",
    errno.EACCES: "choose another --workdir or change its permissions",
    errno.EPERM: "choose another --workdir or change its permissions",
    errno.EROFS: "choose another --workdir",
    errno.ENOTDIR: "choose another --workdir",
    errno.EEXIST: "choose another --workdir",
}


@contextlib.contextmanager
def storage_faults(workdir: Path) -> Iterator[None]:
    """Context manager: turns a full disk or an unwritable folder into a UserError with a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = storage_fault(error, workdir)
        if said is None:
            raise
        raise said from error


def storage_fault(error: Exception, workdir: Path) -> UserError | None:
    """The UserError for an error about writing to `workdir`; None for other errors."""
    code = error.errno if isinstance(error, OSError) else _errno_in(str(error), workdir)
    place = Path(getattr(error, "filename", None) or workdir)
    if code == errno.ENOENT and not workdir.exists():  # and cannot be created
        return UserError(f"cannot create {workdir}: {os.strerror(code)}: choose another --workdir")
    if code not in _REMEDIES or not (place.is_relative_to(workdir) or workdir.is_relative_to(place)):
        return None
    return UserError(f"cannot write {place}: {os.strerror(code)}: {_REMEDIES[code]}")


def _errno_in(text: str, workdir: Path) -> int | None:
    """TensorStore reports operating-system errors as text that names the file."""
    if str(workdir) not in text:
        return None
    return next((code for code in _REMEDIES if os.strerror(code).lower() in text.lower()), None)
