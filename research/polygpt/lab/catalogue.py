"""The catalogue of the package's attention variants, found by walking its folder."""

import dataclasses
import importlib
import inspect
import pkgutil
import re

import polygpt.attention
from polygpt.attention.contract import Attention
from polygpt.attention.kernels.dispatch import BACKENDS
from polygpt.spec import class_name

ARXIV = re.compile(r"\d{4}\.\d{4,5}")
"""An arXiv number."""
SENTENCE = re.compile(r"(?<!\bal)\. (?=[A-Z])")
"""The end of a sentence."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant.

    Attributes:
        name: the class.
        spec: the value for `--model.decoder.attention`.
        family: softmax or linear.
        about: the first sentence of its docstring.
        paper: the source named by the class itself, an arXiv number or "author, year, place"; or "".
        backends: the backends that can compute it; empty if it has its own implementation.
        cost: FLOPs, excluding projections, of one query that sees S keys.
    """

    name: str
    spec: str
    family: str
    about: str
    paper: str
    backends: tuple[str, ...]
    cost: str


def variants() -> list[type[Attention]]:
    """The classes, softmax family first, sorted by file name within each family."""
    found = {}
    for module in pkgutil.iter_modules(polygpt.attention.__path__, "polygpt.attention."):
        for value in vars(importlib.import_module(module.name)).values():
            own = isinstance(value, type) and issubclass(value, Attention) and value.__module__ == module.name
            if own and not value.__name__.startswith("_") and value.build is not Attention.build:
                found[value.__name__] = value
    return sorted(found.values(), key=lambda cls: (cls.family != "softmax", class_name(cls)))


def entry(cls: type[Attention]) -> Entry:
    """The entry of a variant, whose fields must all have defaults."""
    spec = cls()
    about = SENTENCE.split(" ".join(inspect.getdoc(cls).split()))[0].rstrip(".")
    paper = vars(cls).get("paper", "")  # not inherited: a derived variant has another source
    return Entry(cls.__name__, class_name(cls), spec.family, about, paper, spec.backends(), spec.cost())


def markdown(entries: list[Entry]) -> str:
    """The table of the README."""
    lines = ["| variant | family | paper | backends | FLOPs per query that sees S keys |", "|---|---|---|---|---|"]
    for one in entries:
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})" if ARXIV.fullmatch(one.paper) else one.paper or "–"
        own = "all" if set(one.backends) == set(BACKENDS) else ", ".join(one.backends) or "its own"
        lines.append(f"| `{one.spec}` | {one.family} | {paper} | {own} | {one.cost} |")
    return "\n".join(lines)
