"""Writes the plans of this folder: every preset on one slice of each TPU generation.

    python experiments/plans/write.py [PRESET ...] [--missing | --again] [--budget SECONDS] [--only SLICE]

For each plan it searches, as `polygpt plan --search` does, among the configurations that are predicted to leave half of
the memory free, and stops at the first that fits. A plan that comes from a full search is not overwritten. At the end
it writes the index. A plan of a large preset takes two to five minutes on two cores. `polygpt plan check` recompiles
all plans and compares them; where they no longer match the code, `--again` recompiles the same configurations.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from polygpt.errors import UserError
from polygpt.files import plain, write_atomically
from polygpt.markup import Table, markdown
from polygpt.scale.plan import check
from polygpt.scale.plan.search import search
from polygpt.scale.plan.tables import gib, seconds
from polygpt.scale.plan.target import target
from polygpt.spec import load_file

HERE = Path(__file__).parent
ROOM = 0.5
"""Maximum share of usable memory that a plan may be predicted to need: predictions are low, and compilation is slow
when memory is nearly full."""
SLICES = {
    "1m": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"),
    "10m": ("v5e:2x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"),
    "150m": ("v5e:4x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"),
    "400m": ("v5e:4x8", "v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x2"),
    "1b": ("v5e:8x8", "v5p:2x4x4", "v6e:4x8", "tpu7x:2x2x4"),
    "3b": ("v5e:8x16", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x4x4"),
    "7b": ("v5e:16x16", "v5p:4x4x8", "v6e:8x16", "tpu7x:4x4x4"),
    "32b": ("v5e:16x16", "v5p:4x4x4", "v6e:16x16", "tpu7x:4x4x4"),
}
"""Presets, and the slices to plan them for."""


def main() -> None:
    """Writes the requested plans and the index of all plans."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("presets", nargs="*", default=list(SLICES))
    words.add_argument("--budget", type=float, default=780)
    which = words.add_mutually_exclusive_group()
    which.add_argument("--missing", action="store_true", help="keep existing plans unchanged")
    which.add_argument("--again", action="store_true", help="recompile existing plans without a search")
    words.add_argument("--only", help="a slice")
    chosen = words.parse_args()
    for name in chosen.presets:
        for on in SLICES[name]:
            if chosen.only not in (None, on) or (chosen.missing and place(name, on).exists()):
                continue
            if chosen.again:
                again(name, on, chosen.budget)
            else:
                write(name, on, chosen.budget)
    index()


def write(name: str, on: str, budget: float) -> None:
    """Plans a preset on a slice."""
    file = f"experiments/presets/{name}.py"
    if place(name, on).exists() and "searched" in json.loads(place(name, on).read_text()):
        print(f"{name} on {on}: found by a search, and left: polygpt plan {file} --on {on} --search", file=sys.stderr)
        return
    experiment = load_file(file).experiment()

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        found = search(experiment, target(on), budget, tell, at_once=1, enough=1, room=ROOM)
    except UserError as error:
        print(f"{name} on {on}: {error}", file=sys.stderr)
        return
    if found.best is None:
        print(f"{name} on {on}: nothing that was compiled fits", file=sys.stderr)
        return
    path = place(name, on)
    path.parent.mkdir(exist_ok=True)
    put(path, found.best.data, file, found.best.candidate.overrides(experiment))


def again(name: str, on: str, budget: float) -> None:
    """Recompiles a preset on a slice with the configuration of its existing plan."""
    path = place(name, on)
    try:
        before, now = check.recompile(path, budget)
    except UserError as error:
        print(f"{error}; it stays as it was", file=sys.stderr)
        return
    if not (now["memory"] and now["memory"]["fits"]):
        print(f"{path}: does not fit now; it stays as it was", file=sys.stderr)
        return
    put(
        path,
        now | {key: before[key] for key in ("best", "searched") if key in before},
        before["file"],
        before["changes"],
    )


def put(path: Path, data: dict, file: str, changes: dict[str, str]) -> None:
    """Writes a plan."""
    write_atomically(path, json.dumps(plain(data | {"file": file, "changes": changes}), indent=1) + "\n")
    print(f"{path}: {gib(data['memory']['total'])}", file=sys.stderr)


def place(name: str, on: str) -> Path:
    """The file of a plan."""
    return HERE / name / f"{on.replace(':', '-')}.json"


def index() -> None:
    """Writes README.md from the existing plans."""
    rows = []
    for name in SLICES:
        for path in sorted((HERE / name).glob("*.json")):
            data = json.loads(path.read_text())
            memory, roofline, settings = data["memory"], data["roofline"], data["settings"]
            mesh = ", ".join(f"{axis} {size}" for axis, size in settings["mesh"].items())
            if pipeline := settings.get("pipeline"):
                mesh += " (pipeline of {microbatches} microbatches, {repeats} rounds)".format(**pipeline)
            how = f"{mesh}; remat {settings['remat']}" + (
                f", towers {settings['towers']}" if settings["towers"] else ""
            )
            how += f"; {settings['microbatches']} microbatches" if settings["microbatches"] > 1 else ""
            figures = [f"{gib(memory['total'])} of {gib(memory['usable'])}", seconds(roofline["step"])]
            figures += [roofline["bound"], f"{roofline['mfu_ceiling']:.1%}", f"{roofline['mfu_nothing_hidden']:.1%}"]
            rows.append(
                [f"[{name}]({name}/{path.name})", data["on"], how, *figures, f"{data['compile_seconds']:.0f} s"]
            )
    columns = ["preset", "on", "how", "memory per device", "step time at least", "bound by", "MFU ceiling"]
    columns += ["MFU, no overlap", "compiled in"]
    table = markdown(Table("Plans", columns, rows, prose=frozenset(range(len(columns)))))
    text = (HERE / "about.md").read_text()
    write_atomically(HERE / "README.md", f"{text.rstrip()}\n\n{table}\n")


if __name__ == "__main__":
    main()
