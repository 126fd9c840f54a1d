"""Pickling for worker processes, including classes defined in a user's own file."""

import functools
import io
import os
import types
from typing import Any

import cloudpickle

from polygpt.snapshot import load_file


def dumps(value: Any) -> bytes:
    """Pickles `value` for `pickle.loads` in a process that has not loaded the files that define its classes."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):
    """Stores modules that `load_file` loaded, and their classes and functions, by file instead of by name."""

    def reducer_override(self, obj):
        if isinstance(obj, types.ModuleType) and os.path.isabs(obj.__name__):
            return load_file, (obj.__name__,)
        if isinstance(obj, (type, types.FunctionType)) and os.path.isabs(obj.__module__ or ""):
            if "<" not in obj.__qualname__:  # <locals> and <lambda> are pickled by value
                return _of_file, (obj.__module__, obj.__qualname__)
        return super().reducer_override(obj)


def _of_file(file: str, qualified: str) -> Any:
    return functools.reduce(getattr, qualified.split("."), load_file(file))
