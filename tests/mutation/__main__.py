"""`make mutation`: changes sampled lines of the library one at a time, and counts how many changes a test notices.

    python tests/mutation [--folders attention,data] [--count 10] [--seed 0] [--survivors] [--table]

Works in a clone of the committed tree. A mutant runs the fast tests whose files name its module, directly or through
a helper; first those that share rare words with the changed function; until one fails. A test that fails without the
mutants as well does not count. Needs the test environment; `.mutation/results.json` keeps what was found.
"""

import argparse
import ast
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from forked import Forked
from operators import Mutant, mutants
from table import write_table

ROOT = Path(__file__).parents[2]
# The folders of tests for each folder of the library.
TESTS = {
    "attention": ["attention", "contracts"],
    "data": ["data", "contracts"],
    "training": ["training", "parallel"],
    "runtime": ["runtime", "training"],
    "optim": ["optim"],
    "ablation": ["ablation"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", default=",".join(TESTS))
    parser.add_argument("--count", type=int, default=10, help="mutants per folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, help="begin no test of a mutant after so many CPU seconds")
    parser.add_argument("--survivors", action="store_true", help="only the mutants that survived the last time")
    parser.add_argument("--table", action="store_true", help="write tests/MUTATION.md")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    record = ROOT / ".mutation" / "results.json"
    record.parent.mkdir(exist_ok=True)
    results = json.loads(record.read_text()) if record.exists() else {}
    with tempfile.TemporaryDirectory(prefix="polygpt-mutation-") as place:
        copy, scratch = Path(place) / "polygpt", Path(place) / "scratch"
        _git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(copy))
        scratch.mkdir()
        tests = Forked(copy, scratch)
        commit = _git("rev-parse", "--short=9", "HEAD", at=copy)
        chosen = {
            f"{path}: {mutant.text}: {mutant.words()}": (folder, path, mutant)
            for folder in given.folders.split(",")
            for path, mutant in sample(copy, folder, given.count, given.seed)
        }
        unsteady = set()
        while pending := [name for name in chosen if _open(results.get(name), unsteady, given.survivors)]:
            for name in pending:
                folder, path, mutant = chosen[name]
                result = _try(tests, folder, path, mutant, given.limit, unsteady)
                results[name] = {"folder": folder, "commit": commit, **result}
                record.write_text(json.dumps(results, indent=1))
                said = "{status:9}{seconds:5.0f} s  {path}:{mutant.line} {change}  [{by}]"
                print(said.format(path=path, mutant=mutant, change=mutant.words(), **result), flush=True)
            given.survivors = None
            unsteady |= tests.failing({results[name]["by"] for name in chosen if results[name]["status"] != "survived"})
        if given.table:
            found = [(path, mutant, results[name]) for name, (_, path, mutant) in chosen.items()]
            write_table(ROOT / "tests" / "MUTATION.md", found, given.count, given.seed)


def sample(root: Path, folder: str, count: int, seed: int) -> list[tuple[str, Mutant]]:
    """`count` mutants of `polygpt/FOLDER`, one on a line, chosen by a hash of seed, file and text of the line.

    So a change elsewhere changes no choice, and a higher count adds others.
    """
    by_line = {}
    for file in sorted((root / "research/polygpt" / folder).rglob("*.py")):
        if "recipe" in file.parts:  # made the embedded data once, with programs that tests do not have
            continue
        source = file.read_text()
        for mutant in mutants(source):
            key = f"{seed} {file.relative_to(root)} {mutant.text}"
            by_line.setdefault((key, mutant.line), []).append((str(file.relative_to(root)), mutant))
    found = []
    for key, line in sorted(by_line, key=lambda place: (hashlib.sha256(place[0].encode()).digest(), place[1]))[:count]:
        chosen = random.Random(key)
        kind = chosen.choice(sorted({mutant.kind for _, mutant in by_line[key, line]}))
        found.append(chosen.choice([pair for pair in by_line[key, line] if pair[1].kind == kind]))
    return found


def _open(result: dict | None, unsteady: set[str], survivors: bool | None) -> bool:
    """Whether a mutant is to be run: first all, or the survivors; then those that an unsteady test killed."""
    if survivors is None:
        return result["by"] in unsteady
    return result is None or not survivors or result["status"] == "survived"


def _try(tests: Forked, folder: str, path: str, mutant: Mutant, limit: float, unsteady: set[str]) -> dict:
    file, begun = tests.copy / path, time.monotonic()
    source = file.read_text()
    chosen = naming(tests.copy, folder, path)
    arguments = ["-x", "-m", "not slow and not plans", *(f"--deselect={test}" for test in unsteady), *chosen]
    file.write_text(mutant.apply(source))
    try:
        outcome = tests.run(arguments, around(source, mutant.line), limit)
    finally:
        file.write_text(source)
        for made in ("runs", ".hypothesis"):
            shutil.rmtree(tests.copy / made, ignore_errors=True)
    status = {"passed": "survived", "failed": "killed", "timeout": "timeout"}[outcome.status]
    by = outcome.tests[0] if outcome.tests else f"{len(chosen)} files, {outcome.left} tests not begun"
    return {"status": status, "seconds": time.monotonic() - begun, "by": by}


REQUIREMENTS = "tests/contracts/test_requirements.py"
"""Tests what all specifications refuse, without naming their modules."""


def naming(root: Path, folder: str, path: str) -> list[str]:
    """The test files that name the module at `path`, themselves or through a helper, short ones first.

    Where none does, those that name a module that imports it, and so on.
    """
    texts = {file: file.read_text() for part in ("tests", "research") for file in (root / part).rglob("*.py")}
    texts = {str(file.relative_to(root)): text for file, text in texts.items()}
    tests = [file for file in texts if Path(file).match("test_*.py") and file.split("/")[1] in TESTS[folder]]
    wanted = {path}
    while True:
        named = {file for file, text in texts.items() if any(_names(text, module) for module in wanted)}
        found = {file for file in named if file.startswith("tests/")}
        while more := {file for file in texts if file.startswith("tests/") and _helped(texts[file], found)} - found:
            found |= more
        if found & set(tests) or named <= wanted:
            chosen = sorted(found & set(tests) or tests, key=lambda file: (len(texts[file]), file))
            return [*chosen, *([REQUIREMENTS] if "self.require(" in texts[path] else [])]
        wanted |= {file for file in named if file.startswith("research/")}


def _names(text: str, path: str) -> bool:
    module = path.removeprefix("research/").removesuffix(".py").replace("/", ".")
    package, _, stem = module.rpartition(".")
    return re.search(rf"{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{stem}\b", text) is not None


def _helped(text: str, helpers: set[str]) -> bool:
    stems = {Path(helper).stem for helper in helpers if not Path(helper).match("test_*.py")}
    return not stems.isdisjoint(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))


def around(source: str, line: int) -> str:
    """The function around a line with the names of its classes; the whole file where there is no function."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    outer = [node for node in nodes if node.lineno <= line <= node.end_lineno]
    names = " ".join(node.name for node in outer)
    functions = [ast.get_source_segment(source, node) for node in outer if isinstance(node, ast.FunctionDef)]
    return f"{names} {functions[-1]}" if functions else source


def _git(*arguments: str, at: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=at, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
