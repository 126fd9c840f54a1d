"""Time to import, to help, and to the first step of the quickstart, each in a fresh process.

    python experiments/benchmarks/startup.py

Cold is with an empty cache folder: the embedded data are unpacked and the step is compiled. Warm is the same command
again. The first step has ended when its metrics are there; the time is that of `goodput.jsonl`, which begins with the
process. CPU seconds are those of the process and its children in the whole command, on all cores.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

TITLE = "Start-up"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import jax": ["-c", "import jax"],
    "import polygpt.api": ["-c", "import polygpt.api"],
    "polygpt --help": ["-m", "polygpt.cli.main", "--help"],
    "polygpt train FILE --help": ["-m", "polygpt.cli.main", "train", "experiments/quickstart.py", "--help"],
}
"""Words after the interpreter, by name."""
WARM, COLD = "first step, warm", "first step, cold"
TRAIN = ["-m", "polygpt.cli.main", "train", "experiments/quickstart.py", "--no-report", "--train.steps", "1"]
TRAIN += ["--train.evaluate_every", "null"]
SMALLER = ["--data.batch_size", "2", "--model.decoder.depth", "1", "--model.adapters.audio.tower.depth", "0"]
BEFORE = ("startup", "compile", "input_wait", "productive")
"""Categories of goodput up to the first metrics."""


class Launcher:
    """Runs commands, keeps their CPU seconds.

    Args:
        quick: trains a smaller model.
    """

    def __init__(self, quick: bool):
        self._more = SMALLER if quick else []
        self.cpu: dict[str, list[float]] = {}

    def launch(self, name: str, words: list[str], **environment: str) -> float:
        """Wall seconds of a process that must succeed."""
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            cwd=harness.ROOT,
            env={**os.environ, **environment},
        )
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.cpu.setdefault(name, []).append(used)
        return seconds

    def first_step(self, name: str, cache: str) -> tuple[float, dict[str, float]]:
        """Seconds until the first step of the quickstart has ended, and by category."""
        with tempfile.TemporaryDirectory(prefix="polygpt-bench-") as folder:
            run = Path(folder) / "run"
            environment = {"POLYGPT_CACHE": cache, "JAX_COMPILATION_CACHE_DIR": str(Path(cache) / "compiled")}
            self.launch(name, [*TRAIN, *self._more, "--workdir", str(run)], **environment)
            spent = dict.fromkeys(BEFORE, 0.0)
            for line in (run / "goodput.jsonl").read_text().splitlines():
                for category, seconds in json.loads(line)["seconds"].items():
                    if category in spent:
                        spent[category] += seconds
        return sum(spent.values()), spent


def run(quick: bool, say) -> dict:
    """Seconds of each command, and of the categories of the first step."""
    launcher = Launcher(quick)
    commands = {name: COMMANDS[name] for name in ("python -c pass", "polygpt --help")} if quick else COMMANDS
    sides = {name: lambda name=name, words=words: launcher.launch(name, words) for name, words in commands.items()}
    seconds = harness.alternate(sides, 1 if quick else harness.REPEATS, 0 if quick else 1, say, own_clock=True)
    parts: dict[str, list[dict]] = {COLD: [], WARM: []}

    def first_step(name: str, cache: str) -> float:
        total, spent = launcher.first_step(name, cache)
        parts[name].append(spent)
        return total

    with tempfile.TemporaryDirectory(prefix="polygpt-bench-cache-") as cache:
        cold, times = [], 0 if quick else 3
        for index in range(times):
            say(f"{COLD}: {index + 1} of {times}")
            cold.append(first_step(COLD, str(Path(cache) / str(index))))
        if cold:
            seconds[COLD] = harness.summary(cold)
        warm = {WARM: lambda: first_step(WARM, str(Path(cache) / "0"))}
        seconds |= harness.alternate(
            warm, 1 if quick else harness.REPEATS, 0, lambda text: say(f"{WARM}: {text}"), own_clock=True
        )
    return {
        "seconds": seconds,
        "cpu": {name: harness.summary(used) for name, used in launcher.cpu.items()},
        "parts": {
            name: {key: harness.summary([one[key] for one in spent]) for key in BEFORE}
            for name, spent in parts.items()
            if spent
        },
    }


def tables(result: dict) -> str:
    """A row per command, and the parts of the first step."""
    rows = [
        [f"`{name}`" if name in COMMANDS else name, harness.with_quartiles(one)]
        + [harness.with_quartiles(result["cpu"][name]), len(one["values"])]
        for name, one in result["seconds"].items()
    ]
    parts = [[name, *(harness.with_quartiles(one[key]) for key in BEFORE)] for name, one in result["parts"].items()]
    named = ["up to the program", "compiling or loading it, and the step", "waiting for input", "fetching its metrics"]
    text = harness.table(["command", "seconds", "CPU seconds", "runs"], rows)
    return text + "\n\n" + harness.table(["seconds", *named], parts)


def figures(result: dict) -> dict[str, str]:
    """Seconds by name."""
    names = {"import": "import polygpt.api", "help": "polygpt --help", "warm": WARM, "cold": COLD}
    return {key: f"{result['seconds'][name]['median']:.1f}" for key, name in names.items() if name in result["seconds"]}


if __name__ == "__main__":
    harness.alone(sys.modules[__name__])
