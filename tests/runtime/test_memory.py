"""Freed memory stays in the process."""

import os
import platform
import subprocess
import sys

import pytest

from polygpt.runtime.memory import keep_freed_memory

FAULTS = """
import resource, sys, threading
import numpy as np
from polygpt.runtime.memory import keep_freed_memory

assert keep_freed_memory() == bool(int(sys.argv[1]))

def block():
    np.empty(100 * 2**20, np.uint8).fill(1)

def run():
    global faults
    for _ in range(3):
        block()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        block()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=run)  # programs run in threads
thread.start()
thread.join()
print(faults)
"""


def faults(kept: bool, **environment: str) -> int:
    """Page faults of three blocks of 100 MiB, taken and freed by a thread after three others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, str(int(kept))]
    return int(subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_large_block_does_not_fault_its_pages_in_again():
    if "LD_PRELOAD" in os.environ or "GLIBC_TUNABLES" in os.environ:
        pytest.skip("the environment has its own malloc")
    pages = 100 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults(kept=True) < pages / 10


def test_settings_of_the_environment_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
