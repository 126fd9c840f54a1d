"""Runs tests in a forked process that has JAX and pytest imported already.

The parent imports and computes nothing: XLA starts its threads at the first computation, and threads do not survive a
fork. A fork saves the ten seconds that the imports take.
"""

import compileall
import contextlib
import importlib
import inspect
import json
import math
import os
import py_compile
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

IMPORTS = (
    "jax", "jax.numpy", "flax.nnx", "optax", "orbax.checkpoint", "grain", "numpy", "scipy.stats", "PIL.Image",
    "soundfile", "soxr", "tokenizers", "jiwer", "sklearn", "rich", "matplotlib", "hypothesis", "pytest",
)  # fmt: skip
HANGS = 600  # seconds: a test that takes longer counts as a timeout, also on a loaded machine
WORD = re.compile(r"[^\W\d]\w{3,}")
NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True)
class Outcome:
    """How the tests ended: "passed", "failed", "timeout". `tests` failed or hung; `left` were not begun."""

    status: str
    tests: tuple[str, ...] = ()
    left: int = 0


class Order:
    """A pytest plugin: tests with rare words of `text` come first; none begins after `limit` seconds of CPU time."""

    def __init__(self, record: Path, text: str, limit: float):
        self.record, self.words, self.limit = record, set(WORD.findall(text)), limit
        self.said = {"failed": [], "running": "", "left": 0}

    def pytest_collection_modifyitems(self, items):
        shared = [self.words & _words(item) for item in items]
        common = Counter(word for words in shared for word in words)
        score = {item: sum(1 / common[word] for word in words) for item, words in zip(items, shared, strict=True)}
        items.sort(key=score.get, reverse=True)

    def pytest_runtest_protocol(self, item, nextitem):
        if sum(os.times()[:4]) > self.limit:  # of this process and of those that it started
            self.said["left"] += 1
            return True
        self.said["running"] = item.nodeid
        self._write()
        signal.alarm(HANGS)  # ends the process, as XLA would not hear an exception

    def pytest_runtest_logreport(self, report):
        self._failure(report)

    def pytest_collectreport(self, report):
        self._failure(report)

    def _failure(self, report):
        if report.failed and report.nodeid not in self.said["failed"]:
            self.said["failed"].append(report.nodeid)
            self._write()

    def pytest_sessionfinish(self):
        signal.alarm(0)
        self._write()

    def _write(self):
        self.record.write_text(json.dumps(self.said))


def _words(item) -> set[str]:
    source = inspect.getsource(item.function) if hasattr(item, "function") else ""
    return set(WORD.findall(item.nodeid + source))


class Forked:
    """Runs the tests of a copy of the repository at `copy`. `scratch` is a folder outside it."""

    def __init__(self, copy: Path, scratch: Path):
        self.copy, self.scratch = copy, scratch
        os.environ.update(
            PYTHONPATH=str(copy / "research"),
            JAX_PLATFORMS="cpu",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
            POLYGPT_CACHE=str(scratch / "data"),
        )
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(scratch / "jax"))
        hashed = py_compile.PycInvalidationMode.CHECKED_HASH  # times are too coarse for a mutant of the same length
        compileall.compile_dir(copy / "research", quiet=1, invalidation_mode=hashed)
        sys.path[:] = [str(copy / "research"), *(place for place in sys.path if Path(place) != Path(__file__).parent)]
        for name in IMPORTS:
            importlib.import_module(name)

    def run(self, arguments: list[str], text: str = "", limit: float = math.inf) -> Outcome:
        """Runs pytest with these arguments; for `text` and `limit` see `Order`."""
        record = self.scratch / "record.json"
        record.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = self._child(arguments, Order(record, text, limit))
            finally:
                os._exit(code)
        try:
            _, status = os.waitpid(child, 0)
        finally:  # and what the tests started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status)
        said = json.loads(record.read_text()) if record.exists() else {"failed": [], "running": "import", "left": 0}
        if code == -signal.SIGALRM:
            return Outcome("timeout", (said["running"],))
        if code in (0, NO_TESTS):
            return Outcome("passed", left=said["left"])
        return Outcome("failed", tuple(said["failed"] or [said["running"]]))

    def failing(self, tests: set[str]) -> set[str]:
        """Those that fail as the tree is now."""
        named = sorted(test for test in tests if "::" in test)
        return set(self.run(named).tests) if named else set()

    def _child(self, arguments: list[str], order: Order) -> int:
        os.setsid()
        os.chdir(self.copy)
        log = os.open(self.scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        import pytest

        quiet = ["-q", "-o", f"cache_dir={self.scratch / 'cache'}", "-p", "no:xdist", "-p", "no:cov"]
        return pytest.main([*quiet, *arguments], plugins=[order])
