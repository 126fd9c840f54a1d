"""A run's copies of user code, so that its weights are always loaded by the code that trained them.

A run folder has `code/`: a copy of each file outside of this package whose class the run's configuration names, and of
what these files import from their own folder or package, or from the working directory around it.
`code/sources.json` lists them: {"modules": [{"name", "file", "original", "sha256"}]}. No installed package is copied,
unless the configuration names one of their classes. Of a notebook the definitions that its classes need are kept: see
`notebook.py`.

The originals are used as long as all are unchanged. If one has changed or is gone, all classes are loaded from the
copies. The module of a copy is named by its path and has the original's name as `__copy_of__`, so that the
configuration reads the same, and two runs with different copies of a file can be open in one process. Import statements
in a copy find the other copies; imports by other means do not. `__file__` is the original, if it still exists: data
files beside it are not copied.
"""

import builtins
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

from polygpt import notebook, spec
from polygpt.errors import SpecError, UserError
from polygpt.files import write_atomically
from polygpt.sources import Source, collect, hash_of_code, package_of, parents, parts_of

log = logging.getLogger(__name__)

INDEX = "sources.json"


def keep(value: Any, folder: Path, aside: Path | None = None) -> None:
    """Stores copies of the user code in `value` in `folder`; removes the folder if there is none.

    Args:
        value: contains specifications.
        folder: not changed if it already has these copies.
        aside: where to move different existing copies; default: remove them.
    """
    entries, texts, taken = [], {}, {}
    for source in collect(value).values():
        place = _place(source, taken)
        digest, original = hashlib.sha256(source.text).hexdigest(), source.original and str(source.original)
        entry = {"name": source.name, "file": str(place), "original": original, "sha256": digest}
        entries.append(entry | ({"classes": list(source.classes)} if source.classes else {}))
        texts[place] = source.text
    if (_entries(folder) if folder.exists() else []) == entries:
        return
    partial, former = (folder.with_name(f".{folder.name}.{os.getpid()}{ending}") for ending in ("", ".former"))
    for place, text in texts.items():
        (partial / place).parent.mkdir(parents=True, exist_ok=True)
        (partial / place).write_bytes(text)
    if entries:
        write_atomically(partial / INDEX, json.dumps({"modules": entries}, indent=2) + "\n")
    if folder.exists():
        folder.rename(aside or former)
    if entries:
        partial.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _entries(folder: Path) -> list[dict[str, Any]] | None:
    index = folder / INDEX
    return json.loads(index.read_text(encoding="utf-8"))["modules"] if index.is_file() else None


def _place(source: Source, taken: dict[str, Path]) -> Path:
    """Path of a copy: in a folder named like the folder of the original or of its outermost package."""
    if source.original is None:
        return Path("notebook", "notebook.py")
    package = source.original.name == "__init__.py"
    folder = source.original.parents[len(parents(source.name)) + package]
    label = folder.name or "root"
    while taken.setdefault(label, folder) != folder:
        label += "_"
    return label / source.original.relative_to(folder)


class Snapshot:
    """The copies of user code in a folder, which need not exist.

    Raises:
        UserError: a copy is missing.
    """

    def __init__(self, folder: Path):
        self.sources: dict[str, Source] = {}
        self._places: dict[str, Path] = {}
        self._bare: dict[str, types.ModuleType] = {}
        for entry in _entries(folder) or []:
            place = self._places[entry["name"]] = folder.resolve() / entry["file"]
            if not place.is_file():
                raise UserError(f"{place} is missing: restore it, or use the current code with --code current")
            text, original = place.read_bytes(), entry["original"]
            if hashlib.sha256(text).hexdigest() != entry["sha256"]:
                log.warning("%s was edited after it was copied", place)
            classes = tuple(entry.get("classes", ()))
            self.sources[entry["name"]] = Source(entry["name"], original and Path(original), text, classes)

    @functools.cached_property
    def needed(self) -> bool:
        """Whether the copies are needed, because an original has changed or is gone."""
        unchanged = (source.text == source.now for source in self.sources.values())
        main = self.sources.get(notebook.MAIN)
        return not all(unchanged) or main is not None and main.live is None

    def edited(self) -> list[str]:
        """Paths of the originals whose code has changed, or "the notebook"."""
        names = []
        for source in self.sources.values():
            now = source.now
            try:
                if now is not None and now != source.text and hash_of_code(now) != hash_of_code(source.text):
                    names.append(str(source.original or "the notebook"))
            except SyntaxError:
                names.append(str(source.original))
        return list(dict.fromkeys(names))

    def load_module(self, name: str) -> types.ModuleType:
        """A module by its name in the run's configuration, from its copy if needed. Raises SpecError if it fails."""
        return self._copy(name) if name in self.sources and self.needed else spec.load_module(name)

    def load_current(self, name: str) -> types.ModuleType:
        """The current module. Raises SpecError if it is gone or fails."""
        source = self.sources.get(name)
        gone = source and (source.live if name == notebook.MAIN else source.now) is None
        if gone:
            place = source.original or "the notebook"
            raise SpecError(f"the code of {place} no longer exists: omit --code current")
        return spec.load_module(name)

    def load_file(self, place: str) -> types.ModuleType:
        """The copy at a path."""
        return self._copy(next(name for name, path in self._places.items() if str(path) == place))

    def _copy(self, name: str) -> types.ModuleType:
        source, place = self.sources[name], self._places[name]
        there = sys.modules.get(str(place))
        if there is not None and there.__source__ == source.text:
            return there
        module = types.ModuleType(str(place))
        module.__copy_of__, module.__sources__ = name, self.sources
        module.__package__ = package_of(name, place)
        module.__file__ = str(source.original if source.original and source.original.is_file() else place)
        if place.name == "__init__.py":
            module.__path__ = [os.path.dirname(module.__file__)]
        module.__builtins__ = vars(builtins) | {"__import__": self._import}
        return spec.execute(module, source.text, place)

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        """`import` inside a copy: like the built-in, but other copies take precedence over modules of the same name."""
        if level:
            name = importlib.util.resolve_name("." * level + name, globals["__package__"])
        parts = name.split(".")
        if not any(parts_of(kept)[0] == parts[0] for kept in self.sources):
            return builtins.__import__(name, globals, locals, fromlist)
        outer = found = None
        for i, part in enumerate(parts, 1):
            found = self._imported(".".join(parts[:i]))
            if outer is not None:
                setattr(outer, part, found)
            outer = found
        for item in fromlist or ():
            if f"{name}.{item}" in self.sources and not hasattr(found, item):
                setattr(found, item, self._imported(f"{name}.{item}"))
        return found if fromlist else self._imported(parts[0])

    def _imported(self, name: str) -> types.ModuleType:
        if name in self.sources:
            return self._copy(name)
        if any(kept.startswith(f"{name}.") for kept in self.sources):  # a package without a file
            return self._bare.setdefault(name, types.ModuleType(name))
        return importlib.import_module(name)


def load_file(path: str) -> types.ModuleType:
    """`spec.load_file` that also handles a run's copies."""
    folder = _folder_of(Path(path))
    return spec.load_file(path) if folder is None else Snapshot(folder).load_file(path)


def _folder_of(place: Path) -> Path | None:
    """The folder of copies that a file is in."""
    return next((folder for folder in place.parents if (folder / INDEX).is_file()), None)
