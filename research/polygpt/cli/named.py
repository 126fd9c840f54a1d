"""A specification named on the command line, `MODULE:SPEC` or `FILE.py:SPEC`, with its fields overridden."""

import dataclasses
import inspect
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polygpt.cli.arguments import change
from polygpt.errors import UserError

OWN = "spec."
"""Prefix for fields of the specification whose name is also an option."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a name stands for.

    Attributes:
        noun: what it is called, such as "an attention variant".
        base: the class from which it derives; a function, so that --help imports little.
        bases: the names of such classes, for messages.
        maker: the name of a classmethod that makes an instance of a class whose fields do not all have defaults.
        data: whether a specification may also be given as JSON, or as the name of a file with it.
    """

    noun: str
    base: Callable[[], type]
    bases: str
    maker: str | None = None
    data: bool = False

    def load(self, name: str, arguments: Namespace | None = None, prefix: str = ""):
        """The specification, with the fields set by the arguments.

        Args:
            name: name of the class.
            arguments: from `Parser.read`; None for the defaults.
            prefix: prefix of field names; "" means no prefix, or `OWN`.

        Raises:
            UserError: the name is of another kind, or a field cannot be set.
        """
        changes, options, given = (arguments.changes, arguments.options, arguments.given) if arguments else ({}, (), ())
        spec = self._load(name, fields_of(prefix, changes), options)
        known = {field.name for field in dataclasses.fields(spec)}
        for option in given if not prefix else ():
            if (field := option.removeprefix("--")) in known:
                _log.warning(f"{option} is an option here: --{OWN}{field} sets the field of {type(spec).__name__}")
        return spec

    def fields(self, name: str | None, changes: Mapping[str, str], options: Sequence[str]):
        """What `--help` lists: the fields of the named specification."""
        return name and self._load(name, fields_of("", changes), options)

    def _load(self, name: str, changes: Mapping[str, str], options: Sequence[str]):
        from polygpt.spec import faults_of, from_json, load_class

        if self.data and (name.lstrip().startswith("{") or name.endswith(".json")):
            found = from_json(_json(name), "the JSON")
            self._require(type(found), "the JSON")
            return change(found, changes, options)
        cls = load_class(name)
        self._require(cls, name)
        make = None if self.maker is None else getattr(cls, self.maker)
        own = make is not None and make.__func__ is not getattr(self.base(), self.maker).__func__
        missing = dataclasses.MISSING
        without = [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]
        if without and not own:
            also = f", or a classmethod {self.maker}()" if make else ""
            raise UserError(f"{name} has required fields: add defaults for {', '.join(without)}{also}")
        with faults_of(inspect.getsourcefile(cls) or name):
            return change(make() if own else cls(), changes, options)

    def _require(self, cls: type, name: str) -> None:
        if not issubclass(cls, self.base()):
            raise UserError(f"{name} is not {self.noun}: it must derive from {self.bases}")


def fields_of(prefix: str, changes: Mapping[str, str]) -> dict[str, str]:
    """The changes with the prefix, which is removed; "" means all changes of the first specification itself."""
    if prefix:
        return {name.removeprefix(prefix): text for name, text in changes.items() if name.startswith(prefix)}
    return {name.removeprefix(OWN): text for name, text in changes.items() if not name.startswith("against.")}


def _json(text: str) -> Any:
    place = text if text.endswith(".json") else "the JSON"
    try:
        return json.loads(Path(text).read_text() if text.endswith(".json") else text)
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{place} is not valid: {error}") from error
