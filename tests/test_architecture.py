"""The house rules that a machine can check: floors, thin packages, short files, plain words."""

import ast
import functools
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "research" / "polygpt"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350  # lines; about 300 is a long file


def test_a_file_imports_lower_floors_or_siblings():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_folder_stands_on_a_floor():
    listed = re.findall(r"polygpt\.(\w+)", (ROOT / "pyproject.toml").read_text().partition("layers = [")[2])
    present = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert present <= set(listed)


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_a_package_file_only_re_exports(path):
    for statement in ast.parse(path.read_text()).body:
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        dunder = bool(targets) and all(ast.unparse(target) in ("__version__", "__all__") for target in targets)
        assert docstring or dunder or isinstance(statement, (ast.Import, ast.ImportFrom)), ast.unparse(statement)


def test_there_is_no_drawer_for_everything():
    assert [p for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_files_are_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_the_words_are_the_projects_own():
    """No stubs, no left-over notes, no absolute paths of the machine that it was written on."""
    forbidden = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError\(\)|/tmp/|/home/")
    texts = [*FILES, *ROOT.glob("experiments/**/*.py"), *ROOT.glob("tests/**/*.py"), ROOT / "README.md"]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []


def test_every_module_says_what_it_is():
    unspoken = [str(p.relative_to(ROOT)) for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))]
    assert [name for name in unspoken if not name.endswith("__init__.py")] == []


def modules_of(tree: ast.Module) -> dict[str, types.ModuleType]:
    """The modules of the package that a file imports, by the names that they have there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "polygpt":
            for alias in node.names:
                if importlib.util.find_spec(f"{node.module}.{alias.name}") if _is_package(node.module) else None:
                    found[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
    return found


@functools.cache
def _is_package(name: str) -> bool:
    return importlib.util.find_spec(name).submodule_search_locations is not None


@pytest.mark.parametrize("folder", ["research", "tests", "experiments"])
def test_what_a_file_takes_from_a_module_is_there(folder):
    """A renamed function is also renamed where only a slow test would call it."""
    missing = []
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        modules = modules_of(tree)
        bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in bound:
                module = modules.get(node.value.id)
                if module is not None and not hasattr(module, node.attr):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {module.__name__}.{node.attr}")
    assert missing == []


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them as modules without packages: of two with one name it refuses the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
