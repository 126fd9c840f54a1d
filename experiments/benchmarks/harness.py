"""What all benchmarks share: alternating runs, medians with quartiles, the machine, and a Markdown table.

A benchmark is a file with a docstring, a `TITLE` and

    run(quick, say) -> dict     measures; the result is JSON. With `quick` at toy size, in seconds.
    tables(result) -> str       the result as Markdown
    figures(result) -> dict     optional: short texts by name, which READMEs show between markers (rendering.py)
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPEATS = 7
"""The smallest number of timed runs of each side at full size."""
CLEAR = "\r\033[K"
"""Returns to the begin of a terminal's line and clears it."""
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "tiktoken", "pillow", "torch")
PACKAGES += ("transformers",)
NEEDED = {"torch": "pip install torch==2.13.0", "transformers": "pip install -e '.[parity]'"}


class Unmeasurable(Exception):
    """A benchmark cannot run here; the message is one line that names the remedy."""


def need(*modules: str) -> None:
    """Raises Unmeasurable if one of the modules is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise Unmeasurable(f"{name} is not installed: {NEEDED.get(name, f'pip install {name}')}")


def summary(seconds: Sequence[float]) -> dict:
    """Median, quartiles and the single values, with five significant digits."""
    values = [float(f"{one:.5g}") for one in seconds]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": median, "low": low, "high": high, "values": values}


def alternate(
    sides: dict[str, Callable[[], object]],
    repeats: int = REPEATS,
    warmup: int = 1,
    say: Callable[[str], None] = lambda text: None,
    own_clock: bool = False,
    least: float = 0.0,
) -> dict[str, dict]:
    """Runs the sides in turn, every second round in reverse order, so that background load affects all alike.

    A side that takes less than `least` seconds is called in each round once without a clock, which lets the threads of
    the side before it come to rest, and then as often as fills that time.

    Args:
        sides: functions by name, each of which returns when its work is done.
        repeats: timed rounds.
        warmup: rounds before them, which are not timed.
        say: is called with the state after each round.
        own_clock: the sides return their time in seconds, such as that of a part of a fresh process.
        least: the shortest time to measure, in seconds; the time of one call is a mean over it.

    Returns:
        A `summary` of the seconds of each side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, float] = {}
    for index in range(warmup + repeats):
        for name in list(sides)[:: 1 if index % 2 == 0 else -1]:
            calls = 1 + int(least / last[name]) if index else 1
            if calls > 1:
                sides[name]()
            start = time.perf_counter()
            for _ in range(calls):
                result = sides[name]()
            last[name] = result if own_clock else (time.perf_counter() - start) / calls
            if index >= warmup:
                seconds[name].append(last[name])
        say(f"round {index + 1} of {warmup + repeats}")
    return {name: summary(values) for name, values in seconds.items()}


def ratio(above: dict, below: dict) -> dict:
    """Summary of the quotients of two sides, round by round."""
    return summary([a / b for a, b in zip(above["values"], below["values"], strict=True)])


def fresh(code: str, *words: str, environment: dict[str, str] | None = None) -> str:
    """What a fresh Python process prints that runs this code.

    Raises:
        RuntimeError: it fails; ends with the last line of its stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        raise RuntimeError(f"a process failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def hardware() -> dict:
    """Processor, cores, memory in GiB and the accelerator, if jax has one."""
    cpu = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_GiB": round(memory)}
    import jax

    if jax.default_backend() != "cpu":
        found["accelerator"] = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions() -> dict[str, str]:
    """Python and the packages that a benchmark may use, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit, with "+" if tracked files differ, other than what `make bench` writes; "" without git."""
    written = [":!experiments/benchmarks/results.json", ":!*.md"]
    try:
        head = _git("rev-parse", "--short=9", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def with_quartiles(side: dict, scale: float = 1.0, unit: str = "") -> str:
    """ "12.3 (11.9 to 12.8) ms": the median and the quartiles."""
    median, low, high = (number(side[key] * scale) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})" + (f" {unit}" if unit else "")


def number(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{value:#.3g}"


def alone(benchmark) -> None:
    """The command line of a single benchmark's file: measures and prints the tables, or JSON; stores nothing."""
    parser = argparse.ArgumentParser(
        description=benchmark.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at toy size, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    given = parser.parse_args()
    try:
        result = benchmark.run(given.quick, progress(Path(benchmark.__file__).stem))
    except Unmeasurable as reason:
        sys.exit(str(reason))
    print(json.dumps(result) if given.json else benchmark.tables(result))


def progress(name: str) -> Callable[[str], None]:
    """A function that prints the state of a benchmark on stderr: on one line of a terminal, else twice per minute."""
    begun = printed = time.monotonic()

    def say(text: str) -> None:
        nonlocal printed
        now = time.monotonic()
        line = f"{name}: {now - begun:4.0f} s, {text}"
        if sys.stderr.isatty():
            print(f"{CLEAR}{line}", end="", file=sys.stderr, flush=True)
        elif now - printed >= 30:
            printed = now
            print(line, file=sys.stderr, flush=True)

    return say
