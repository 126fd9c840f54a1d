"""Shorthands for many variants, or the values of a factor: each makes a mapping from names to changes.

A change is a dotted field with its new value, `{"model.decoder.width": 64}`, as `overrides.replaced` takes it.
"""

import functools
from collections.abc import Mapping
from typing import Any

from polygpt.errors import SpecError

Name = int | float | str
"""Name of a variant, or value of a factor."""
Changes = Mapping[str, Any]
"""New values by dotted field."""


def grid(field: str, *values: Any) -> dict[Name, Changes]:
    """Values of one field, each named by itself.

    Raises:
        SpecError: a value is neither number nor string; name it with `{"name": {field: value}}`.
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Name):
            raise SpecError(f"grid({field!r}): {value!r} is not a name: write {{name: {{{field!r}: value}}, ...}}")
    return _distinct([(value, {field: value}) for value in values], f"grid({field!r})")


def product(*parts: Mapping[Name, Changes]) -> dict[Name, Changes]:
    """All combinations: names joined by " + ", changes merged.

    Raises:
        SpecError: two parts change the same field.
    """
    pairs = [("", {})]
    for i, part in enumerate(parts):
        pairs = [
            (f"{name} + {own}" if name else str(own), united({name or "nothing": before, f"{own} (part {i})": changes}))
            for name, before in pairs
            for own, changes in part.items()
        ]
    return _distinct(pairs, "product")


def zipped(first: Mapping[Name, Changes], *others: Mapping[Name, Changes]) -> dict[Name, Changes]:
    """Element by element: the i-th changes of all parts, merged under the i-th name of the first.

    Raises:
        SpecError: their lengths differ, or two change the same field.
    """
    for other in others:
        if len(other) != len(first):
            raise SpecError(f"zipped: {len(first)} and {len(other)} entries: the numbers must be equal")
    rows = zip(*(part.values() for part in (first, *others)), strict=True)
    return {
        name: united({f"part {i}": changes for i, changes in enumerate(row)})
        for name, row in zip(first, rows, strict=True)
    }


def chain(*parts: Mapping[Name, Changes]) -> dict[Name, Changes]:
    """All parts in one mapping. Raises SpecError if two have the same name."""
    return _distinct([pair for part in parts for pair in part.items()], "chain")


def united(parts: Mapping[str, Changes]) -> dict[str, Any]:
    """All changes merged; keys of `parts` appear in errors. Raises SpecError if two change the same field."""

    def add(before: tuple[dict, dict], part: tuple[str, Changes]) -> tuple[dict, dict]:
        (changes, owner), (name, own) = before, part
        for field in own:
            if field in changes:
                raise SpecError(f"{owner[field]} and {name} both change {field}: only one of them may")
        return {**changes, **own}, {**owner, **dict.fromkeys(own, name)}

    return functools.reduce(add, parts.items(), ({}, {}))[0]


def _distinct(pairs: list[tuple[Name, Changes]], what: str) -> dict[Name, Changes]:
    found = {}
    for name, changes in pairs:
        if name in found:
            raise SpecError(f"{what}: duplicate name {name!r}")
        found[name] = changes
    return found
