"""Every attention variant of the package, found by walking its folder, and what each says of itself."""

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
"""Where a sentence ends."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant.

    Attributes:
        name: the class.
        spec: what `--model.decoder.attention` takes.
        family: softmax or linear.
        about: the first sentence of its docstring.
        paper: what the class itself calls its source, an arXiv number or "author, year, place"; or "".
        backends: those that can compute it; empty where it has a form of its own.
        cost: FLOPs beside the projections of one query that sees S keys.
    """

    name: str
    spec: str
    family: str
    about: str
    paper: str
    backends: tuple[str, ...]
    cost: str


def variants() -> list[type[Attention]]:
    """The classes, softmax family first, each family by the name of the file."""
    found = {}
    for module in pkgutil.iter_modules(polygpt.attention.__path__, "polygpt.attention."):
        for value in vars(importlib.import_module(module.name)).values():
            own = isinstance(value, type) and issubclass(value, Attention) and value.__module__ == module.name
            if own and not value.__name__.startswith("_") and value.build is not Attention.build:
                found[value.__name__] = value
    return sorted(found.values(), key=lambda cls: (cls.family != "softmax", class_name(cls)))


def entry(cls: type[Attention]) -> Entry:
    """What a variant says of itself; one without defaults for its fields cannot be listed."""
    spec = cls()
    about = SENTENCE.split(" ".join(inspect.getdoc(cls).split()))[0].rstrip(".")
    paper = vars(cls).get("paper", "")  # not inherited: what derives from a paper's variant is not that paper's
    return Entry(cls.__name__, class_name(cls), spec.family, about, paper, spec.backends(), spec.cost())


def markdown(entries: list[Entry]) -> str:
    """The table of the README."""
    lines = ["| variant | family | paper | backends | FLOPs a query that sees S keys |", "|---|---|---|---|---|"]
    for one in entries:
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})" if ARXIV.fullmatch(one.paper) else one.paper or "–"
        own = "all" if set(one.backends) == set(BACKENDS) else ", ".join(one.backends) or "its own"
        lines.append(f"| `{one.spec}` | {one.family} | {paper} | {own} | {one.cost} |")
    return "\n".join(lines)
