"""An attention variant named on the command line, `MODULE:SPEC` or `FILE.py:SPEC`, with its fields overridden."""

import dataclasses
import inspect
import logging
import re
import zlib
from argparse import Namespace
from collections.abc import Mapping, Sequence

from polygpt.cli.arguments import change
from polygpt.errors import UserError

HELP = (
    "the variant, package.module:Class or FILE.py:CLASS; --NAME VALUE sets a field, --spec.NAME VALUE a field whose "
    "name is also an option"
)
"""Help text of the argument that names a variant."""
OWN = "spec."
"""Prefix for fields of the variant whose name is also an option."""

_log = logging.getLogger(__name__)


def load(name: str, arguments: Namespace | None = None, prefix: str = ""):
    """The specification, with the fields set by the arguments.

    Args:
        name: name of the class.
        arguments: from `Parser.read`; None for the defaults.
        prefix: prefix of field names; "" means no prefix, or `OWN`.

    Raises:
        UserError: the name is not an attention variant, or a field cannot be set.
    """
    changes, options, given = (arguments.changes, arguments.options, arguments.given) if arguments else ({}, (), ())
    spec = _load(name, fields_of(prefix, changes), options)
    known = {field.name for field in dataclasses.fields(spec)}
    for option in given if not prefix else ():
        if (field := option.removeprefix("--")) in known:
            _log.warning(f"{option} is an option here: --{OWN}{field} sets the field of {type(spec).__name__}")
    return spec


def fields(name: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """What `--help` lists: the fields of the named variant."""
    return name and _load(name, fields_of("", changes), options)


def fields_of(prefix: str, changes: Mapping[str, str]) -> dict[str, str]:
    """The changes with the prefix, which is removed; "" means all changes of the variant itself."""
    if prefix:
        return {name.removeprefix(prefix): text for name, text in changes.items() if name.startswith(prefix)}
    return {name.removeprefix(OWN): text for name, text in changes.items() if not name.startswith("against.")}


def picture(names: Sequence[str | None], arguments: Namespace, kind: str) -> str:
    """Default path of a picture, named after the classes, the changed fields and the options given."""
    words = [name.rpartition(":")[2] for name in names if name]
    words += [f"{name.removeprefix(OWN)}-{text}" for name, text in arguments.changes.items()]
    options = [name for name in sorted(arguments.given) if name not in ("--json", "--debug", "--against", "--picture")]
    words += [f"{name[2:]}-{getattr(arguments, name[2:].replace('-', '_'))}" for name in options]
    text = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join([*words, kind]))
    return f"runs/{text if len(text) <= 120 else f'{text[:100]}-{zlib.crc32(text.encode()):08x}-{kind}'}.png"


def _load(name: str, changes: Mapping[str, str], options: Sequence[str]):
    from polygpt.attention.contract import Attention
    from polygpt.spec import faults_of, load_class

    cls = load_class(name)
    if not issubclass(cls, Attention):
        raise UserError(f"{name} is not an attention variant: it must derive from polygpt.api.Attention or MultiHead")
    without = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory]  # MISSING
    if without:
        raise UserError(f"{name} has required fields: add defaults for {', '.join(without)}")
    with faults_of(inspect.getsourcefile(cls) or name):
        return change(cls(), changes, options)
