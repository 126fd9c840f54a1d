"""Finds the classes of a package folder by walking it: a new file is held to its contract without being listed."""

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping

import pytest

from polygpt.data.sources.base import Source
from polygpt.data.sources.embedded import Embedded
from polygpt.data.transforms.base import Transform
from polygpt.data.transforms.fill_in_the_middle import FillInTheMiddle
from polygpt.spec import Spec, hints

PLAIN = {Source: Embedded("text", characters=2000), Transform: FillInTheMiddle()}
"""What stands for base classes without behaviour."""


def specs(package: str, base: type) -> list:
    """Every subclass of `base` defined below `package`, `base` left out, as parameters for pytest."""
    found = {}
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, base) and value is not base:
                if value.__module__ == module.name and not value.__name__.startswith("_"):
                    found[value.__name__] = value
    assert found, f"{package} has no {base.__name__}"
    return [pytest.param(found[name], id=name) for name in sorted(found)]


def minimal(cls: type) -> Spec:
    """The class with its defaults; a field without one gets the simplest value that its annotation allows."""
    without = (
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return cls(**{name: simplest(hints(cls)[name], name) for name in without})


def simplest(annotation, name: str):
    """The first option of a Literal, the name itself for a text, a variadic tuple or a mapping of one, or 8."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Literal, typing.Union, types.UnionType):
        return arguments[0] if origin is typing.Literal else simplest(arguments[0], name)
    if origin is tuple:
        return tuple(simplest(argument, name) for argument in arguments if argument is not Ellipsis)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: simplest(arguments[1], name)}
    if annotation is typing.Any:
        return 8
    if issubclass(annotation, Spec):
        return PLAIN.get(annotation) or minimal(annotation)
    return annotation(name if annotation is str else 8)
