"""User code: finds the files outside of this package that define a specification's classes, and hashes them.

A run keeps copies of these files (`snapshot.py`), and keys of ablation results include their hashes.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from polygpt import notebook
from polygpt.spec import Spec, specs_in

log = logging.getLogger(__name__)

OWN = __name__.partition(".")[0]
"""This package: its files are never copied."""
ENTRIES = ("ablation", "experiment", "search")
"""Functions that describe runs and do not affect what a file's classes compute."""
INSTALLED = tuple({Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")})


def classes_of(value: Any) -> Iterator[type]:
    """The classes of all specifications inside a value, with their bases."""
    for found in specs_in(value):
        yield from (cls for cls in type(found).__mro__ if issubclass(cls, Spec) and cls is not Spec)


def user_classes(value: Any) -> list[type]:
    """Those classes that are outside of this package, each once."""
    return [cls for cls in dict.fromkeys(classes_of(value)) if parts_of(cls.__module__)[0] != OWN]


def file_of(cls: type) -> Path | None:
    """The file that a class was loaded from, which may be a run's copy. None if it was typed into an interpreter."""
    module = sys.modules.get(cls.__module__)
    file = cls.__module__ if hasattr(module, "__copy_of__") else getattr(module, "__file__", None)
    return Path(file) if file else None


def code_hash(file: Path) -> str:
    """SHA-256 of a file's code without comments, the module docstring and the functions in ENTRIES."""
    return _code_hash(file, os.stat(file).st_mtime_ns)


@functools.lru_cache(256)
def _code_hash(file: Path, changed: int) -> str:
    return hash_of_code(file.read_bytes())


def hash_of_code(text: bytes) -> str:
    """`code_hash` of a file with this content."""
    tree = ast.parse(text)
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    kept = [part for part in body if not (isinstance(part, ast.FunctionDef) and part.name in ENTRIES)]
    return hashlib.sha256("\n".join(map(_dump, kept)).encode()).hexdigest()


def _dump(node: Any) -> str:
    """`ast.dump` of Python 3.11, by every version.

    3.12 adds a field for type parameters and ends some format specifications with an empty text; 3.13 omits empty
    lists.
    """
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: getattr(node, name) for name in node._fields}
    if isinstance(node, ast.JoinedStr):
        fields["values"] = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    shown = [f"{name}={_dump(value)}" for name, value in fields.items() if not _is_left_out(node, name, value)]
    return f"{type(node).__name__}({', '.join(shown)})"


def _is_left_out(node: ast.AST, field: str, value: Any) -> bool:
    """Whether a field is optional and not set, or unknown to Python 3.11 and empty."""
    return (value is None and getattr(type(node), field, ...) is None) or (field == "type_params" and not value)


@dataclasses.dataclass(frozen=True)
class Source:
    """A module of user code.

    Attributes:
        name: of the module: dotted, the path of a file that `load_file` loaded, or "__main__".
        original: its file; None for a notebook.
        text: its content when it was copied.
        classes: for "__main__", the classes that need it.
    """

    name: str
    original: Path | None
    text: bytes
    classes: tuple[str, ...] = ()

    @property
    def now(self) -> bytes | None:
        """The current content: as loaded in this process, otherwise from its file. None if there is neither."""
        file = self.original if self.original and self.original.is_file() else None
        if self.live is not None or file is None:
            return self.live
        return notebook.source(self.classes, file) if self.name == notebook.MAIN else file.read_bytes()

    @property
    def live(self) -> bytes | None:
        """The content as loaded in this process, if known."""
        if self.name == notebook.MAIN:
            return notebook.source(self.classes)
        return getattr(sys.modules.get(self.name), "__source__", None)


def collect(value: Any) -> dict[str, Source]:
    """By module name, the source of every user class inside `value`, and of what its file imports from its folder."""
    classes, found = user_classes(value), {}
    for cls in classes:
        module = sys.modules.get(cls.__module__)
        if hasattr(module, "__copy_of__"):  # of a run that is open in this process: all of its copies are passed on
            found |= module.__sources__
        elif cls.__module__ != notebook.MAIN:
            _collect(cls.__module__, _roots(cls.__module__), found)
    if names := tuple({c.__qualname__.partition(".")[0]: 0 for c in classes if c.__module__ == notebook.MAIN}):
        text = notebook.source(names)
        if text is None:
            log.warning("class %s was typed into an interpreter: no other process can open its run", names[0])
            return found
        found[notebook.MAIN] = Source(notebook.MAIN, notebook.script(), text, names)
        _follow(text, "", _roots(notebook.MAIN), found)
    return found


def _collect(name: str, roots: tuple[Path, ...], found: dict[str, Source]) -> None:
    """Adds a module with its packages and imports, unless already present."""
    file = _file(name)
    if file is None or name in found:
        return
    loaded = getattr(sys.modules.get(name), "__source__", None)
    found[name] = source = Source(name, file, file.read_bytes() if loaded is None else loaded)
    for outer in parents(name):
        _collect(outer, roots, found)
    _follow(source.text, package_of(name, file), roots, found)


def _follow(text: bytes, package: str, roots: tuple[Path, ...], found: dict[str, Source]) -> None:
    """Adds the modules that a text imports, wherever in it, and whose files lie below one of these folders."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if (file := _file(name)) is not None and _is_users(name, file, roots):
                _collect(name, roots, found)


def _is_users(name: str, file: Path, roots: tuple[Path, ...]) -> bool:
    installed = any(file.is_relative_to(place) for place in INSTALLED)
    below = any(file.is_relative_to(root) for root in roots)
    return below and parts_of(name)[0] != OWN and (not installed or file.is_relative_to(roots[0]))


def _roots(name: str) -> tuple[Path, ...]:
    """Where a module's imports are the user's own: its folder or package, and the working directory around that."""
    file = notebook.script() if name == notebook.MAIN else _file(name)
    if file is None:
        return (Path.cwd(),)
    package = list(getattr(sys.modules.get(parts_of(name)[0]), "__path__", ()))
    folder = Path(package[0]).resolve() if package else file.parent
    if folder in INSTALLED:  # a module that is installed on its own
        return (file,)
    return (folder, Path.cwd()) if folder.is_relative_to(Path.cwd()) else (folder,)


def _file(name: str) -> Path | None:
    """The Python file of a module, found without importing it; None if it has none."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
    else:
        outer, within = name.rpartition(".")[0], None
        if outer:
            package = _file(outer)
            if package is None or package.name != "__init__.py":
                return None
            within = [str(package.parent)]
        found = PathFinder.find_spec(name, within)
        file = found and found.origin
    return Path(file).resolve() if file and file.endswith(".py") and os.path.isfile(file) else None


def parts_of(name: str) -> list[str]:
    """Of a module's name; the path of a file is one part."""
    return [name] if os.path.isabs(name) else name.split(".")


def parents(name: str) -> list[str]:
    """The packages that a module is in, the outermost first."""
    parts = parts_of(name)
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def package_of(name: str, file: Path) -> str:
    """A module's `__package__`; "" for one that is in none."""
    return name if file.name == "__init__.py" else (parents(name) or [""])[-1]
