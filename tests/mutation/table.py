"""The table of `make mutation`, as Markdown."""

import os
import platform
import tomllib
from collections import Counter
from pathlib import Path

from operators import Mutant

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def write_table(out: Path, found: list[tuple[str, Mutant, dict]], count: int, seed: int):
    """Writes counts per folder, and the survivors. `found` has path, mutant and result of each."""
    reasons = tomllib.loads(EQUIVALENT.read_text())
    counts = {}
    for _, _, result in found:
        counts.setdefault(result["folder"], Counter())[result["status"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    commits = ", ".join(sorted({result["commit"] for _, _, result in found}))
    lines = [
        "# Faults that the tests notice",
        "",
        f"    make mutation MUTATION='--count {count} --seed {seed} --table'",
        "",
        f"Run at {commits} with Python {platform.python_version()} on {os.cpu_count()} cores of {platform.machine()}.",
        "",
        "A mutant is a small fault in one line, chosen at random; `tests/mutation/operators.py` lists the kinds. It",
        "runs the fast tests that name its module. It is noticed if one fails, or hangs, that passes without it.",
        "",
        "| folder | mutants | killed | timeouts | survived | noticed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for folder, all_of in counts.items():
        figures = [all_of[status] for status in ("killed", "timeout", "survived")]
        cells = [folder, all_of.total(), *figures, f"{1 - all_of['survived'] / all_of.total():.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "## Survivors", ""] if counts["all"]["survived"] else []
    for path, mutant, result in found:
        if result["status"] == "survived":
            why = reasons.get(path, {}).get(mutant.text, "")
            place = f"{path.removeprefix('research/polygpt/')}:{mutant.line}"
            lines.append(f"- `{place}` {mutant.words()}" + (f": {why}" if why else ""))
    out.write_text("\n".join(lines) + "\n")
