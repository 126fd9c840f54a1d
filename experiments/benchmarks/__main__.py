"""Runs benchmarks, each in a process of its own, stores their results and renders the pages.

make bench                              all, under 25 minutes on 2 idle cores
make bench BENCH="text_step decoding"   some; the results of the others stay
make bench-gpu                          those for a GPU, under 8 minutes
python experiments/benchmarks --render  only the pages, from results.json
python experiments/benchmarks --quick   at toy size, to see that they run; stores nothing
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import rendering


def main() -> int:
    """Runs what the command line names; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python experiments/benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"(default: all) {', '.join(rendering.PARTS)}")
    parser.add_argument("--gpu", action="store_true", help="the benchmarks for a GPU")
    parser.add_argument("--quick", action="store_true", help="at toy size; stores nothing")
    parser.add_argument("--render", action="store_true", help="write the pages again from results.json")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # a process for one benchmark
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in (*rendering.PARTS, rendering.GPU)]:
        parser.error(f"no benchmark {unknown[0]}: name some of {', '.join(rendering.PARTS)}")
    if not given.gpu and rendering.GPU not in given.names:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if given.into:
        given.into.write_text(json.dumps(one(given.names[0], given.quick)))
        return 0
    names = [rendering.GPU] if given.gpu else given.names or rendering.PARTS
    failed = [] if given.render else [name for name in names if not measured(name, given.quick)]
    if not given.quick:
        write()
    if failed:
        print(f"failed: {', '.join(failed)}; their former results stay", file=sys.stderr)
    return bool(failed)


def one(name: str, quick: bool) -> dict:
    """The record of a benchmark, which runs in this process."""
    load, begun = os.getloadavg()[0], time.monotonic()
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    try:
        result = rendering.benchmark(name).run(quick, harness.progress(name))
    except harness.Unmeasurable as reason:
        sys.exit(f"{name}: {reason}")
    return {
        "date": date,
        "commit": harness.commit(),
        "hardware": harness.hardware(),
        "versions": harness.versions(),
        "load": round(load, 2),
        "seconds": round(time.monotonic() - begun, 1),
        "result": result,
    }


def measured(name: str, quick: bool) -> bool:
    """Runs a benchmark in a fresh process and stores its record, or with `quick` prints it; False on failure."""
    with tempfile.TemporaryDirectory(prefix="polygpt-bench-") as folder:
        record = Path(folder) / "record.json"
        words = [sys.executable, str(rendering.FOLDER), name, "--into", str(record), *["--quick"] * quick]
        print(f"{name}: begun", file=sys.stderr, flush=True)
        if subprocess.run(words, stdout=sys.stderr).returncode:
            return False
        found = json.loads(record.read_text())
    print(
        f"{harness.CLEAR if sys.stderr.isatty() else ''}{name}: {found['seconds']:.0f} s", file=sys.stderr, flush=True
    )
    if quick:
        print(rendering.benchmark(name).tables(found["result"]))
    else:
        records = rendering.load() | {name: found}
        ordered = {key: records[key] for key in (*rendering.PARTS, rendering.GPU) if key in records}
        rendering.RESULTS.write_text(compact(ordered), encoding="utf-8")
        write()
    return True


def compact(records: dict) -> str:
    """JSON with a line per benchmark and short lists on one line, so that a change of one part changes few lines."""
    lines = [f'"{name}": {json.dumps(record, allow_nan=False)}' for name, record in records.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write() -> None:
    """Writes RESULTS.md and the figures of the READMEs."""
    for page, text in rendering.rendered(rendering.load()).items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
