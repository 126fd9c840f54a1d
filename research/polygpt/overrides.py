"""Overrides fields of specifications by dotted names, `{"model.decoder.depth": "4"}`, as on the command line.

`replaced` takes values as they are, `{"model.decoder.depth": 4}`: what a program sets. For `override` the text of a
value is read as JSON where it is JSON. A field that holds a specification takes another class by name,
`"package.module:Class"`: it is then what the class's defaults make it, but for the fields that the former value shares
with it and had changed from its own defaults. A list takes such names too: `'["package.module:Class", null]'`. A JSON
object with a "class" may leave out fields that have defaults.
"""

import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Union

from polygpt.errors import SpecError
from polygpt.spec import Spec, conform, field_help, hints, load_class, nearest, nearest_field


@dataclass(frozen=True)
class _Value:
    """A value that is not text to parse."""

    value: Any


Changes = dict[tuple[str, ...], str | _Value]
"""Text or values by the remainder of a dotted name; () is the value itself."""


def override(spec: Any, changes: Mapping[str, str]) -> Any:
    """`spec` with each dotted name set to its parsed value, all at once: the order does not matter.

    Raises:
        SpecError: a name does not exist (suggests similar names), or a value is not allowed.
    """
    return _set(spec, type(spec), {tuple(name.split(".")): text for name, text in changes.items()}, "")


def replaced(spec: Any, changes: Mapping[str, Any]) -> Any:
    """`spec` with each dotted name set to a value of the field's type, all at once.

    If one name is inside another, it is set in the new value of the outer one. Mappings accept new entries.

    Raises:
        SpecError: like `override`.
    """
    return _set(spec, type(spec), {tuple(name.split(".")): _Value(value) for name, value in changes.items()}, "")


def _set(value: Any, annotation: Any, changes: Changes, name: str) -> Any:
    """`value`, whose dotted name is `name`, with changes to itself or to its fields."""
    inside: dict[str, Changes] = {}
    for path, text in changes.items():
        if path:
            key, rest = _entry(path, value)
            inside.setdefault(key, {})[rest] = text
    kept = vars(value) if isinstance(value, Spec) else {}
    cls = type(value)
    if isinstance(changes.get(()), _Value):
        value = conform(annotation, changes[()].value, f"--{name}")
        return _set(value, annotation, {path: given for path, given in changes.items() if path}, name)
    if () in changes:
        data = _read(changes[()])
        if not (isinstance(data, str) and _holds_spec(annotation, value)):
            value = _parse(data, annotation, changes[()], name)
            return _set(value, annotation, {path: text for path, text in changes.items() if path}, name)
        kept, cls = _shared(value, load_class(data)), load_class(data)
    elif not inside:
        return value
    if isinstance(value, Spec) or () in changes:
        return _made(cls, kept, annotation, inside, name)
    if isinstance(value, Mapping):
        for key in inside:
            if key not in value and not isinstance(inside[key].get(()), _Value):
                said = nearest(key, value)
                whole = "" if said.endswith("?") else f"; to add one, write all entries as JSON: --{name} '{{...}}'"
                raise SpecError(f"--{_join(name, key)}: no entry {key!r}: {said}{whole}")
        changed = {key: _set(value.get(key), _inner(annotation), own, _join(name, key)) for key, own in inside.items()}
        return {**value, **changed}
    for key in inside:
        if not (isinstance(value, tuple) and key.isdigit() and int(key) < len(value)):
            raise SpecError(f"--{_join(name, key)}: {key!r} is not inside {value!r}")
    items = list(value)
    for key, own in inside.items():
        items[int(key)] = _set(items[int(key)], _inner(annotation, int(key)), own, _join(name, key))
    return tuple(items)


def _entry(path: tuple[str, ...], value: Any) -> tuple[str, tuple[str, ...]]:
    """The first part of a dotted name and the rest; names of mapping entries may contain dots."""
    if isinstance(value, Mapping):
        for n in range(len(path), 1, -1):
            if (key := ".".join(path[:n])) in value:
                return key, path[n:]
    return path[0], path[1:]


def _made(cls: type, kept: Mapping[str, Any], annotation: Any, inside: dict[str, Changes], name: str) -> Any:
    """A specification of `cls` with the fields `kept` and changes: constructed once, so that fields may change
    together."""
    known, values = hints(cls), dict(kept)
    for key, own in inside.items():
        if key not in known:
            held = {own: hints(type(value)) for own, value in kept.items() if isinstance(value, Spec)}
            deeper = [f"{own}.{field}" for own, fields_of_it in held.items() for field in fields_of_it]
            said = nearest_field(key, cls, deeper)
            raise SpecError(f"--{_join(name, key)}: {cls.__name__} has no field {key!r}: {said}")
        values[key] = _set(values.get(key, _default(cls, key)), known[key], own, _join(name, key))
    made = _constructed(cls, values, name)
    return conform(annotation, made, f"--{name}") if name else made


def _constructed(cls: type, values: Mapping[str, Any], name: str) -> Any:
    try:
        return cls(**values)
    except TypeError as error:
        raise SpecError(f"--{name}: {cls.__name__} needs more than its class: {error}") from None


def _shared(value: Any, cls: type) -> dict[str, Any]:
    """The fields of a specification that `cls` also has and that differ from their defaults."""
    if not isinstance(value, Spec):
        return {}
    own = {key: getattr(value, key) for key in hints(type(value)) if key in hints(cls)}
    return {key: field for key, field in own.items() if field != _default(type(value), key)}


def _default(cls: type, key: str) -> Any:
    """A field's default; MISSING if there is none."""
    field = next(field for field in fields(cls) if field.name == key)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _inner(annotation: Any, index: int = 0) -> Any:
    """The annotation of a mapping's values, or of a tuple's item `index`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):  # Mapping[...] | None
        found = [_inner(option, index) for option in arguments]
        return next((inner for inner in found if inner is not Any), Any)
    if origin is tuple:
        return arguments[0] if arguments[-1] is Ellipsis else arguments[index] if index < len(arguments) else Any
    return arguments[1] if isinstance(origin, type) and issubclass(origin, Mapping) else Any


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _parse(data: Any, annotation: Any, text: str, name: str) -> Any:
    try:
        return conform(annotation, _built(data, annotation, name), f"--{name}")
    except SpecError as fault:
        try:
            return conform(annotation, text, f"--{name}")  # a string field whose value looks like JSON: --name 12
        except SpecError:
            raise fault from None


def _built(data: Any, annotation: Any, name: str) -> Any:
    """JSON data with its specifications: objects with a "class", and names of classes where the annotation has one."""
    if isinstance(data, str) and _holds_spec(annotation, None):
        return _made(load_class(data), {}, annotation, {}, name)
    if isinstance(data, list):
        return tuple(_built(item, _inner(annotation, i), _join(name, str(i))) for i, item in enumerate(data))
    if isinstance(data, dict) and "class" not in data:
        return {key: _built(item, _inner(annotation), _join(name, key)) for key, item in data.items()}
    if not isinstance(data, dict):
        return data
    cls = load_class(data["class"])
    known = hints(cls)
    for key in data:
        if key != "class" and key not in known:
            raise SpecError(f"--{_join(name, key)}: {cls.__name__} has no field {key!r}: {nearest_field(key, cls)}")
    fields = {key: _built(item, known[key], _join(name, key)) for key, item in data.items() if key != "class"}
    return _constructed(cls, fields, name)


def _holds_spec(annotation: Any, value: Any) -> bool:
    if isinstance(value, Spec):
        return True
    options = typing.get_args(annotation) or (annotation,)
    return any(isinstance(option, type) and issubclass(option, Spec) for option in options)


def leaves(spec: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every name that `override` accepts: (dotted name, annotation, value, help text), depth first."""
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
