"""Hashes the library source that a run imports, and checks that compared runs share it.

A run's code has two parts: the *core*, the modules that every run imports to train and evaluate, with one hash, and
*more*, modules imported only by the run's own classes, with one hash each. Both are found by following import
statements from the roots, at any level of a file, so they are independent of the engine and of other imports in the
process. Comments, docstrings and blank lines do not count.
"""

import ast
import functools
import hashlib
import io
import os
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polygpt
from polygpt.sources import classes_of, file_of
from polygpt.spec import Spec
from polygpt.training.workdir import environment

PACKAGE = Path(polygpt.__file__).parent
ROOTS = tuple(f"polygpt.ablation.{name}" for name in ("seeds", "memory", "figures", "record"))
"""Modules that train and measure. The others in this folder only decide what to run and report results."""
DIRTY = "-dirty"
"""Suffix of a commit with uncommitted changes."""
ALONE = "variants may differ for that reason alone"
SHORT = 12
"""Length of abbreviated hashes."""


def made(experiment: Spec) -> dict[str, Any]:
    """Versions, device and code of a run in this process.

    Call it before the run: files may be edited during training.
    """
    said = environment()
    about = {"polygpt": polygpt.__version__, "commit": commit(), "jax": said["jax"], "device": said["device"]}
    return {**about, "code": of(experiment)}


def of(experiment: Spec) -> dict[str, Any]:
    """The code of a run of the experiment: {"core": hash, "more": {module: hash}}."""
    core = _closure(ROOTS)
    classes = list(dict.fromkeys(classes_of(experiment)))
    own = [cls.__module__ for cls in classes if cls.__module__.partition(".")[0] == "polygpt"]
    files = [file for cls in classes if cls.__module__ not in own and (file := file_of(cls))]
    own += [module for file in files for module in _read(file, os.stat(file).st_mtime_ns)[1]]
    text = "\n".join(f"{module} {digest}" for module, digest in sorted(core.items()))
    more = {module: digest[:8] for module, digest in sorted(_closure(tuple(sorted(set(own)))).items())}
    return {
        "core": hashlib.sha256(text.encode()).hexdigest()[:32],
        "more": {module: digest for module, digest in more.items() if module not in core},
    }


@functools.cache
def commit() -> str | None:
    """The commit of the library's source, with "-dirty" if its files have changed since; None outside Git."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        _output([*git, "ls-files", "--error-unmatch", "__init__.py"])
        changed = _output([*git, "status", "--porcelain", "--", "."])
        return _output([*git, "rev-parse", "HEAD"]) + (DIRTY if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def faults(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Reasons against comparing runs, given `made` of each: one sentence per fault."""
    runs = list(runs)
    total, found = len(runs), []
    known = [one for one in runs if one["code"]]
    if unknown := [one for one in runs if not one["code"]]:
        commits = _listed(Counter(_short(one["commit"]) for one in unknown))
        found.append(
            f"{len(unknown)} of {total} runs have unknown code: they predate the recording of the library source "
            f"({commits})."
        )
    cores = Counter((one["code"]["core"][:SHORT], _short(one["commit"])) for one in known)
    hashes: dict[str, set[str]] = {}
    for one in known:
        for module, digest in one["code"]["more"].items():
            hashes.setdefault(module, set()).add(digest)
    differing = sorted(module for module, some in hashes.items() if len(some) > 1)
    if len({core for core, _ in cores}) > 1:
        some = _listed({f"{core}, {commit}": count for (core, commit), count in cores.items()})
        found.append(f"Runs used different versions of the library source ({some}): {ALONE}.")
    elif differing:
        found.append(f"Runs used different versions of {', '.join(differing)}: {ALONE}.")
    if dirty := sum((one["commit"] or "").endswith(DIRTY) for one in runs):
        found.append(f"{dirty} of {total} runs were made with uncommitted changes: their source cannot be restored.")
    return found


def summary(runs: Iterable[Mapping[str, Any]]) -> str:
    """A short description of the code of runs: "code 0123456789ab (commit 0123456789ab)"."""
    runs = list(runs)
    cores = dict.fromkeys(f"code {one['code']['core'][:SHORT]}" if one["code"] else "unknown code" for one in runs)
    commits = dict.fromkeys(_short(one["commit"]) for one in runs)
    return f"{', '.join(cores)} ({', '.join(commits)})"


# --- source -----------------------------------------------------------------------------------------------------------


@functools.cache
def _closure(roots: tuple[str, ...]) -> dict[str, str]:
    """The library modules that the roots import, directly or indirectly, each with the hash of its code."""
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if module in found or file is None or module.startswith("polygpt.ablation.") and module not in ROOTS:
            continue
        found[module], imported = _read(file, os.stat(file).st_mtime_ns)
        waiting += imported
    return found


@functools.lru_cache(1024)
def _read(file: Path, changed: int) -> tuple[str, tuple[str, ...]]:
    """(hash of a file's code, the library modules that it imports)."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines: list[str] = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline) if "#" in text else ():
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    imported: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        elif isinstance(node, ast.Import):
            imported |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= dict.fromkeys([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest(), tuple(name for name in imported if _file(name))


@functools.cache
def _file(module: str) -> Path | None:
    """The file of a library module; None for other names."""
    first, *rest = module.split(".")
    place = PACKAGE.joinpath(*rest)
    candidates = (place / "__init__.py", place.with_name(f"{place.name}.py")) if first == "polygpt" else ()
    return next((file for file in candidates if file.is_file()), None)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _short(commit: str | None) -> str:
    return f"commit {commit[:SHORT]}" if commit else "no commit"


def _listed(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count} of {name}" for name, count in counts.items())
