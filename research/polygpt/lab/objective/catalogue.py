"""The catalogue of the package's objectives, found by walking its folder."""

import dataclasses
import inspect
import typing

import polygpt.objectives
from polygpt.lab import walk
from polygpt.objectives.base import Objective
from polygpt.spec import class_name


@dataclasses.dataclass(frozen=True)
class Entry:
    """One objective.

    Attributes:
        spec: the value for `--objectives`.
        about: the first sentence of its docstring.
        paper: the first arXiv number in its docstring, or "".
        view: the class of its view, or "".
        needs: what it needs besides tokens, models that are not trained included, or "".
    """

    spec: str
    about: str
    paper: str
    view: str
    needs: str


def objectives() -> list[type[Objective]]:
    """The classes that define a loss, in the order of their files; not the bases of others."""
    return [cls for cls in walk.classes(polygpt.objectives, Objective) if not _lacks(cls)]


def _lacks(cls: type[Objective]) -> list[str]:
    """The methods and class variables that a subclass of this class has to define."""
    methods = {name: getattr(getattr(cls, name), "__code__", None) for name in dir(cls)}
    lacking = [name for name, code in methods.items() if code and "NotImplementedError" in code.co_names]
    for parent in cls.__mro__:
        for name, annotation in inspect.get_annotations(parent).items():
            if typing.get_origin(annotation) is typing.ClassVar and not hasattr(cls, name):
                lacking.append(name)
    return lacking


def entry(cls: type[Objective]) -> Entry:
    """The entry of an objective."""
    small = cls.small()
    others = [f"the model {name!r}" for name in small.others]
    view = type(small.view).__name__ if small.view is not None else ""
    needs = ", ".join(filter(None, [small.needs.about, *others]))
    return Entry(class_name(cls), walk.about(cls), _paper(cls), view, needs)


def _paper(cls: type[Objective]) -> str:
    """The first arXiv number in the class's docstring."""
    found = walk.ARXIV.search(inspect.getdoc(cls) or "")
    return found.group() if found else ""


def markdown(entries: list[Entry]) -> str:
    """The table of the README."""
    lines = ["| objective | paper | view | needs | what it is |", "|---|---|---|---|---|"]
    for one in entries:
        lines.append(
            f"| `{one.spec}` | {walk.link(one.paper)} | {one.view or '–'} | {one.needs or '–'} | {one.about} |"
        )
    return "\n".join(lines)
