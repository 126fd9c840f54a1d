"""Locates an error in the user's own code."""

import inspect
import sysconfig
import textwrap
import traceback
from pathlib import Path

import polygpt
from polygpt.errors import UserError

_PACKAGES = [
    Path(polygpt.__file__).parent,
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
]
LONGEST = 300
"""Maximum number of characters of an error message."""


def told(error: Exception, cls: type) -> str:
    """The error in one line, prefixed with the last line of user code in its traceback, if any.

    User code is the file of `cls` and any file outside installed packages.
    """
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())
    if not text and isinstance(error, NotImplementedError) and frames:
        text = f"{cls.__name__} has no {frames[-1].name}()"
    text = textwrap.shorten(text, LONGEST, placeholder=" ...")
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    own = [frame for frame in frames if _is_own(frame.filename, cls)]
    return f"{_shown(own[-1].filename)}, line {own[-1].lineno}: {text}" if own else text


def _is_own(file: str, cls: type) -> bool:
    try:
        if Path(file) == Path(inspect.getfile(cls)):
            return True
    except (TypeError, OSError):  # a class typed into an interpreter
        pass
    return Path(file).is_file() and not any(Path(file).is_relative_to(package) for package in _PACKAGES)


def _shown(file: str) -> str:
    here = Path.cwd()
    return str(Path(file).relative_to(here) if Path(file).is_relative_to(here) else file)
