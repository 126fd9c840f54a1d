"""Keeps freed memory in the process, so that a step on a CPU does not fault its pages in again.

XLA allocates the temporaries of a program each time it runs. glibc takes large blocks, and whatever exceeds the 64
MiB heap of a thread, from the system and gives them back when they are freed; the next step then waits while the kernel
maps and zeroes every page. That was 18 % of the CPU time of a step at 4 x 128 (T 64, batch 12) and 13 % at 6 x 384 (T
256, batch 8).
"""

import ctypes
import os

KEPT = 2**31 - 1
"""Bytes at the end of the heap that are kept when they are free, the largest number that `mallopt` takes."""

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> bool:
    """Makes malloc reuse what was freed; True if it does.

    Call it before JAX starts its threads: a thread that has a heap of its own keeps it. It does nothing without glibc,
    and where the environment configures malloc (GLIBC_TUNABLES, MALLOC_...) or replaces it (LD_PRELOAD).
    """
    if "LD_PRELOAD" in os.environ or any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):  # other libraries' mallopt takes other numbers
            return False
        settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, KEPT), (_ARENA_MAX, 1))
        return all([library.mallopt(*setting) for setting in settings])
    except (OSError, TypeError, AttributeError):  # not Linux, or another C library
        return False
