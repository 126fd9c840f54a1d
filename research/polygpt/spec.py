"""Specifications: frozen dataclasses that describe what to build, serialize to JSON and accept dotted overrides.

A specification is a subclass of `Spec`. Its fields are plain values, other specifications, tuples, or mappings from
names to either; a string literal below a field is its help text. Every value is checked against its annotation on
construction, so a type error is reported immediately and names the field.

As JSON (`to_json`, `from_json`) each specification is an object whose `"class"` key names its class as
`"package.module:Class"`, or `"/path/to/file.py:Class"` for a class in a user file. Reading is strict. Setting
fields by dotted names is in `overrides.py`.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from polygpt import migration
from polygpt.errors import SpecError, UserError


@dataclasses.dataclass(frozen=True)
class Spec:
    """Base class of all specifications. Subclasses must be frozen dataclasses."""

    def __post_init__(self):
        for name, annotation in hints(type(self)).items():
            value = conform(annotation, getattr(self, name), f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)
        self.validate()

    def validate(self) -> None:
        """Raises SpecError if fields are inconsistent. Called on construction."""

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raises SpecError naming the field, its value and what is allowed, unless `condition` holds."""
        if not condition:
            raise SpecError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}: it must be {allowed}")

    def replace(self, **changes):
        """A copy with some fields changed; validated like any other."""
        return dataclasses.replace(self, **changes)


def check_pattern(spec: Spec, field: str) -> None:
    """Raises SpecError unless the field is None or holds a regular expression."""
    try:
        re.compile(getattr(spec, field) or "")
    except re.error as error:
        spec.require(False, field, f"a regular expression ({error})")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotations of a specification's fields, resolved, in order."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


def specs_in(value: Any) -> Iterator[Spec]:
    """All specifications inside a value, itself first, in the order of their fields."""
    if isinstance(value, Spec):
        yield value
        value = tuple(getattr(value, name) for name in value.__dataclass_fields__)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    for item in value if isinstance(value, tuple) else ():
        yield from specs_in(item)


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """Help texts of a specification's fields: the string literal that follows each, base classes included."""
    texts = {}
    for base in reversed(cls.__mro__):
        if not (dataclasses.is_dataclass(base) and issubclass(base, Spec) and base is not Spec):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except (OSError, TypeError, SyntaxError):  # no source: a class typed into an interpreter
            continue
        for statement, following in zip(body, body[1:], strict=False):
            literal = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and literal and isinstance(following.value.value, str):
                texts[statement.target.id] = " ".join(following.value.value.split())
    return texts


def counted(number: int, one: str, many: str | None = None) -> str:
    """A count with its noun, for messages: "1 host", "2 hosts"; `many` defaults to "<one>s"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# --- checking values against annotations ------------------------------------------------------------------------------


def describe(annotation: Any) -> str:
    """A readable description of an annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if annotation is type(None):
        return "null"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(map(describe, arguments))}]"
    if origin is tuple:
        return f"a list of {describe(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from names to {describe(arguments[1])}"
    return getattr(annotation, "__name__", str(annotation))


def conform(annotation: Any, value: Any, where: str) -> Any:
    """`value` converted to `annotation` (int to float, list to tuple). Raises SpecError naming `where`."""
    fault = SpecError(f"{where} is {value!r}: it must be {describe(annotation)}")
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise fault
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return conform(option, value, where)
            except SpecError:
                continue
        raise fault
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise fault
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        if not variadic and len(value) != len(arguments):
            raise SpecError(f"{where} is {value!r}: it must hold {len(arguments)} values")
        items = arguments[:1] * len(value) if variadic else arguments
        pairs = enumerate(zip(items, value, strict=True))
        return tuple(conform(item, v, f"{where}[{i}]") for i, (item, v) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise fault
        return {key: conform(arguments[1], v, f"{where}[{key!r}]") for key, v in value.items()}
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is None:
        annotation = type(None)
    if annotation in (int, float) and isinstance(value, bool) or not isinstance(value, annotation):
        raise fault
    return value


def nearest(name: str, options: Iterable[str], unlisted: Iterable[str] = ()) -> str:
    """A clause that suggests the options most similar to `name`; `unlisted` ones only if they are similar."""
    options = list(options)
    close = difflib.get_close_matches(name, [*options, *unlisted], n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(options)) or 'none'}"


# --- classes by name --------------------------------------------------------------------------------------------------


def load_file(path: str | Path) -> types.ModuleType:
    """Imports a user file, once. The module's name is the absolute path, by which its classes are found later.

    Raises:
        SpecError: the file does not exist or cannot be imported.
    """
    path = Path(path).resolve()
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    if path.is_dir():
        raise SpecError(f"{path} is a folder: name a Python file in it")
    if not path.is_file():
        raise SpecError(f"no file {path}: name an existing Python file")
    if path.suffix != ".py":
        raise SpecError(f"{path} is not a Python file: name one, NAME.py")
    module = types.ModuleType(name)
    module.__file__ = name
    return execute(module, path.read_bytes(), path)


def execute(module: types.ModuleType, source: bytes, path: Path) -> types.ModuleType:
    """Runs the source of a user file in a new module and stores it as `__source__`.

    Raises:
        SpecError: it fails; names the file and the line. The module is then removed from `sys.modules`.
    """
    module.__source__ = source
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # before execution, because dataclasses look up their module
    try:
        with faults_of(path):
            exec(compile(source, path, "exec"), vars(module))
    except BaseException:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
        raise
    return module


@contextlib.contextmanager
def faults_of(path: str | Path) -> Iterator[None]:
    """Turns an error in a user file into a one-line SpecError with file, line and error."""
    path = Path(path).resolve()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = reversed(inspect.getinnerframes(error.__traceback__))
        line = next((frame.lineno for frame in frames if frame.filename == str(path)), getattr(error, "lineno", None))
        place = f"{path}, line {line}" if line else path
        raise SpecError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def class_name(cls: type) -> str:
    """The name `"package.module:Class"`, for `load_class`.

    A class loaded from a run's copy of its file has the original's name: see `sources.Snapshot`.
    """
    module = getattr(sys.modules.get(cls.__module__), "__copy_of__", cls.__module__)
    return f"{module}:{cls.__qualname__}"


def load_module(name: str) -> types.ModuleType:
    """Imports a user file by path, or a module by name. Raises SpecError if that fails."""
    if name.endswith(".py"):
        return load_file(name)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(f"cannot import {name!r}: {' '.join(str(error).split())}") from error


def load_class(name: str, load: Callable[[str], types.ModuleType] = load_module) -> type:
    """The specification class `name`, from a module that `load` returns.

    Raises:
        SpecError: says which part of the name is wrong.
    """
    module_name, colon, qualified = name.rpartition(":")
    if not colon:
        raise SpecError(f"{name!r} is not a class name: write 'package.module:Class' or 'file.py:Class'")
    module = load(module_name)
    found = module
    for part in qualified.split("."):
        if not hasattr(found, part):
            specs = [key for key, v in vars(module).items() if isinstance(v, type) and issubclass(v, Spec)]
            raise SpecError(f"{module_name} has no {qualified!r}: {nearest(qualified, specs)}")
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, Spec)):
        raise SpecError(f"{name!r} is not a specification: it must be a frozen dataclass derived from Spec")
    if inspect.get_annotations(found) and "__dataclass_fields__" not in vars(found):
        raise SpecError(f"{name!r} is not a dataclass: write @dataclasses.dataclass(frozen=True) above its class")
    return found


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """The value as JSON data, specifications as objects with a `"class"` key."""
    if isinstance(value, Spec):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": class_name(type(value)), **fields}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, before, after) of each leaf that differs between trees of JSON data; None where it is missing."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{name}.{i}")
    elif before != after:
        yield name, before, after


def new_names(cls: type) -> dict[str, str]:
    """Former and current names of a specification's fields."""
    return migration.new_names(class_name(base) for base in reversed(cls.__mro__) if base is not object)


def nearest_field(name: str, cls: type, unlisted: Iterable[str] = ()) -> str:
    """A clause about an unknown field of `cls`: its current name if renamed, or similar names."""
    if name in (names := new_names(cls)):
        return f"it is called {names[name]} now"
    return nearest(name, hints(cls), unlisted)


def from_json(data: Any, where: str = "config", load: Callable[[str], types.ModuleType] = load_module) -> Any:
    """Reads the output of `to_json`. Strict: raises SpecError for unknown or missing keys, with similar names.

    A missing field in an older file is an error too, because its default may have changed, which would make it a
    different run. `load` returns the modules of named classes.
    """
    if isinstance(data, list):
        return tuple(from_json(item, f"{where}[{i}]", load) for i, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    if "class" not in data:
        return {key: from_json(item, f"{where}.{key}", load) for key, item in data.items()}
    cls = load_class(data["class"], load)
    known = hints(cls)
    for key in data:
        if key != "class" and key not in known:
            raise SpecError(f"{where}.{key}: {cls.__name__} has no field {key!r}: {nearest_field(key, cls)}")
    missing = [key for key in known if key not in data]
    if missing:
        raise SpecError(f"{where}: {cls.__name__} lacks {', '.join(missing)}")
    return cls(**{key: from_json(item, f"{where}.{key}", load) for key, item in data.items() if key != "class"})
