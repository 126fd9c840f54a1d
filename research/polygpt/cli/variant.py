"""An attention variant named on the command line, `MODULE:SPEC` or `FILE.py:SPEC`, with its fields overridden."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence

from polygpt.cli.arguments import change
from polygpt.errors import UserError


def load(name: str, changes: Mapping[str, str] = (), options: Sequence[str] = ()):
    """The specification; UserError where the name means no attention variant."""
    from polygpt.attention.contract import Attention
    from polygpt.spec import faults_of, load_class

    cls = load_class(name)
    if not issubclass(cls, Attention):
        raise UserError(f"{name} is no attention variant: it must derive from polygpt.api.Attention or MultiHead")
    without = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory]  # MISSING
    if without:
        raise UserError(f"{name} cannot be made of its defaults: give a default to {', '.join(without)}")
    with faults_of(inspect.getsourcefile(cls) or name):
        return change(cls(), dict(changes), options)


def fields(name: str | None, changes: Mapping[str, str], options: Sequence[str]):
    """What `--help` lists: the fields of the variant that is named."""
    return name and load(name, changes, options)
