"""The table of `make mutation`, as Markdown."""

import os
import platform
import tomllib
from collections import Counter
from pathlib import Path

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def write_table(out: Path, results: dict[str, dict], given, commit: str):
    """`results` is `{"FILE:LINE `BEFORE` → `AFTER`": {folder, status, ...}}`."""
    reasons = tomllib.loads(EQUIVALENT.read_text())
    counts = {}
    for result in results.values():
        counts.setdefault(result["folder"], Counter())[result["status"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    lines = [
        "# Mutants that the tests notice",
        "",
        f"    make mutation COUNT={given.count} SEED={given.seed}",
        "",
        f"Commit {commit[:12]}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores.",
        "A mutant is one change of one line, chosen at random; `tests/mutation/operators.py` lists the kinds. It runs",
        "the fast tests that name its module. A test that hangs notices it too.",
        "",
        "| folder | mutants | killed | timeouts | survived | noticed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for folder, count in counts.items():
        figures = [count[status] for status in ("killed", "timeout", "survived")]
        cells = [folder, count.total(), *figures, f"{1 - count['survived'] / count.total():.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    survivors = [name for name, result in results.items() if result["status"] == "survived"]
    lines += ["", "## Survivors", ""] if survivors else []
    for name in survivors:
        place, _, change = name.partition(" ")
        path, _, number = place.rpartition(":")
        why = reasons.get(path, {}).get(change)
        lines.append(f"- `{path.removeprefix('research/polygpt/')}:{number}` {change}" + (f": {why}" if why else ""))
    out.write_text("\n".join(lines) + "\n")
