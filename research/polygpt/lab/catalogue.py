"""The catalogue of the package's attention variants, found by walking its folder."""

import dataclasses

import polygpt.attention
from polygpt.attention.contract import Attention
from polygpt.attention.kernels.dispatch import BACKENDS
from polygpt.lab import walk
from polygpt.spec import class_name


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
    found = [cls for cls in walk.classes(polygpt.attention, Attention) if cls.build is not Attention.build]
    return sorted(found, key=lambda cls: (cls.family != "softmax", class_name(cls)))


def entry(cls: type[Attention]) -> Entry:
    """The entry of a variant, whose fields must all have defaults."""
    spec = cls()
    paper = vars(cls).get("paper", "")  # not inherited: a derived variant has another source
    return Entry(cls.__name__, class_name(cls), spec.family, walk.about(cls), paper, spec.backends(), spec.cost())


def markdown(entries: list[Entry]) -> str:
    """The table of the README."""
    lines = ["| variant | family | paper | backends | FLOPs per query that sees S keys |", "|---|---|---|---|---|"]
    for one in entries:
        own = "all" if set(one.backends) == set(BACKENDS) else ", ".join(one.backends) or "its own"
        lines.append(f"| `{one.spec}` | {one.family} | {walk.link(one.paper)} | {own} | {one.cost} |")
    return "\n".join(lines)
