"""Specifications overridden by dotted names, `{"model.decoder.depth": "4"}`: what a command line may set, and sets.

The text of a value is read as JSON where it is JSON. A field that holds a specification takes another class by name,
`"package.module:Class"`, and keeps the fields that both classes share. A list of specifications takes such names too,
with their defaults: `'["package.module:Class", null]'`.
"""

import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Union

from polygpt.errors import SpecError
from polygpt.spec import Spec, conform, field_help, from_json, hints, load_class, nearest, to_json


def override(spec: Any, changes: Mapping[str, str]) -> Any:
    """`spec` with each dotted name set to the value that its text means.

    The order does not matter: a change that does not fit yet is tried again after the others.

    Raises:
        SpecError: for a name that does not exist (with the nearest names) or a value that its field does not allow.
    """
    faults: list[SpecError] = []
    waiting: dict[str, str] = {}
    for name, text in changes.items():
        try:
            spec = _set(spec, type(spec), name.split("."), text, name)
        except SpecError as fault:
            faults.append(fault)
            waiting[name] = text
    if len(waiting) == len(changes) > 0:
        raise faults[0]
    return override(spec, waiting) if waiting else spec


def _set(value: Any, annotation: Any, path: list[str], text: str, name: str) -> Any:
    if not path:
        return _parse(value, annotation, text, name)
    key, rest = path[0], path[1:]
    if isinstance(value, Spec):
        known = hints(type(value))
        if key not in known:
            raise SpecError(f"--{name}: {type(value).__name__} has no field {key!r}: {nearest(key, known)}")
        return value.replace(**{key: _set(getattr(value, key), known[key], rest, text, name)})
    if isinstance(value, Mapping):
        if key not in value:
            raise SpecError(f"--{name}: no entry {key!r}: {nearest(key, value)}")
        return {**value, key: _set(value[key], _inner(annotation), rest, text, name)}
    if isinstance(value, tuple) and key.isdigit() and int(key) < len(value):
        items = list(value)
        items[int(key)] = _set(items[int(key)], _inner(annotation, int(key)), rest, text, name)
        return tuple(items)
    raise SpecError(f"--{name}: {key!r} is not inside {value!r}")


def _inner(annotation: Any, index: int = 0) -> Any:
    """The annotation of a mapping's values, or of a tuple's item `index`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):  # Mapping[...] | None
        found = [_inner(option, index) for option in arguments]
        return next((inner for inner in found if inner is not Any), Any)
    if origin is tuple:
        return arguments[0] if arguments[-1] is Ellipsis else arguments[index]
    return arguments[1] if isinstance(origin, type) and issubclass(origin, Mapping) else Any


def _parse(value: Any, annotation: Any, text: str, name: str) -> Any:
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(data, str) and _holds_spec(annotation, value):
        cls = load_class(data)
        shared = {}
        if isinstance(value, Spec):
            shared = {key: getattr(value, key) for key in hints(type(value)) if key in hints(cls)}
        try:
            data = cls(**shared)
        except TypeError as error:
            raise SpecError(f"--{name}: {cls.__name__} needs more than its class: {error}") from None
    else:
        data = from_json(_named(data, annotation), f"--{name}")
    try:
        return conform(annotation, data, f"--{name}")
    except SpecError:
        return conform(annotation, text, f"--{name}")  # a field of text whose value looks like JSON: --name 12


def _named(data: Any, annotation: Any) -> Any:
    """Class names in a list of specifications become what they name, with its defaults, as JSON data."""
    if not (isinstance(data, list) and typing.get_origin(annotation) is tuple and _holds_spec(_inner(annotation), None)):
        return data
    return [to_json(load_class(item)()) if isinstance(item, str) else item for item in data]


def _holds_spec(annotation: Any, value: Any) -> bool:
    if isinstance(value, Spec):
        return True
    options = typing.get_args(annotation) or (annotation,)
    return any(isinstance(option, type) and issubclass(option, Spec) for option in options)


def leaves(spec: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every name that `override` takes: (dotted name, annotation, value, help text), depth first."""
    texts = field_help(type(spec))
    for key, annotation in hints(type(spec)).items():
        value = getattr(spec, key)
        yield from _leaves(value, annotation, f"{prefix}{key}", texts.get(key, ""))


def _leaves(value: Any, annotation: Any, name: str, text: str) -> Iterator[tuple[str, Any, Any, str]]:
    if isinstance(value, Spec):
        yield name, annotation, value, text
        yield from leaves(value, f"{name}.")
    elif isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, _inner(annotation), f"{name}.{key}", text)
    elif isinstance(value, tuple) and any(isinstance(item, Spec) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, _inner(annotation, i), f"{name}.{i}", text)
    else:
        yield name, annotation, value, text
