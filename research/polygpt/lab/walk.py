"""Finds the classes of a folder of the package, and what their docstrings say of them."""

import importlib
import inspect
import pkgutil
import re
import types

ARXIV = re.compile(r"\d{4}\.\d{4,5}")
"""An arXiv number."""
SENTENCE = re.compile(r"(?<!\bal)\. (?=[A-Z])")
"""The end of a sentence."""


def classes(package: types.ModuleType, base: type) -> list[type]:
    """The public subclasses of `base` that the files of a package define, in the order of the files."""
    found = {}
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            own = isinstance(value, type) and issubclass(value, base) and value.__module__ == module.name
            if own and not value.__name__.startswith("_"):
                found[value.__name__] = value
    return list(found.values())


def about(cls: type) -> str:
    """The first sentence of a class's docstring."""
    return SENTENCE.split(" ".join(inspect.getdoc(cls).partition("\n\n")[0].split()))[0].rstrip(".")


def link(paper: str) -> str:
    """A paper as Markdown, linked if it is an arXiv number."""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if ARXIV.fullmatch(paper) else paper or "–"
