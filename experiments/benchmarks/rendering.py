"""RESULTS.md and the figures in READMEs, from results.json alone.

A README shows a figure between markers, which the same command replaces once the benchmark has a record:

    <!-- figure text_step.medium_torch -->1.04<!-- end -->
"""

import importlib
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RESULTS = FOLDER / "results.json"
PAGES = (ROOT / "README.md", FOLDER / "README.md")
"""Pages with figures."""
PARTS = (
    "text_step",
    "multimodal_step",
    "attention_layer",
    "input_pipeline",
    "startup",
    "compile_depth",
    "remat_memory",
)
"""The benchmarks of `make bench`, in the order in which they run and are shown."""
GPU = "gpu"
"""The benchmark of `make bench-gpu`."""
FIGURE = re.compile(r"<!-- figure (\w+)\.(\w+) -->.*?<!-- end -->", re.DOTALL)
HEAD = """\
# Results of `make bench`

Written by `make bench` from [results.json](results.json). Times are medians with quartiles in parentheses, of runs that
alternate between the sides; a ratio is the median of the quotients of neighbouring runs, above 1 where polygpt is
faster. The load average is that of the minute before a part began: above 0.5, other processes shared the cores.
`make bench BENCH="{example}"` measures some parts again.
"""


def load() -> dict:
    """The stored records by benchmark."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def benchmark(name: str):
    """The module of a benchmark."""
    return importlib.import_module(name)


def rendered(records: dict) -> dict[Path, str]:
    """The text of each page, by its path."""
    parts = [HEAD.format(example=" ".join(PARTS[:2]))]
    parts += [_part(name, records.get(name)) for name in (*PARTS, GPU) if (FOLDER / f"{name}.py").exists()]
    pages = {FOLDER / "RESULTS.md": "\n".join(parts)}
    texts: dict[str, dict[str, str]] = {}

    def figure(match: re.Match) -> str:
        name, key = match.groups()
        if name not in records:
            return match[0]
        if name not in texts:
            texts[name] = benchmark(name).figures(records[name]["result"])
        return f"<!-- figure {name}.{key} -->{texts[name].get(key, 'not measured')}<!-- end -->"

    return pages | {page: FIGURE.sub(figure, page.read_text(encoding="utf-8")) for page in PAGES}


def _part(name: str, record: dict | None) -> str:
    module = benchmark(name)
    about = module.__doc__.strip().partition("\n\n")[0].replace("\n", " ")
    lines = [f"## {module.TITLE}", "", about, ""]
    command = "make bench-gpu" if name == GPU else f"make bench BENCH={name}"
    if record is None:
        return "\n".join([*lines, f"Not measured yet: `{command}`.", ""])
    machine, packages = record["hardware"], record["versions"]
    where = machine.get("accelerator") or f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_GiB']} GiB"
    said = [f"`{command}`", where, *(f"{package} {version}" for package, version in packages.items())]
    said += [f"commit {record['commit'] or 'unknown'}", record["date"], f"load average before: {record['load']:.2f}"]
    said += [f"took {record['seconds']:.0f} s"]
    return "\n".join([*lines, module.tables(record["result"]), "", f"<sub>{'; '.join(said)}</sub>", ""])
