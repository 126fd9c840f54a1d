"""Parses a verb's arguments: argparse for its own options; any other `--name value` overrides a field of a spec."""

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from polygpt import overrides, spec
from polygpt.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises one-line UserErrors.

    Args:
        prog, about: the command and a description.
        epilog: examples.
        fields: maps the first argument (None if missing), the overrides and the option names to the specification whose
            fields `--help` lists, or to None if it needs the first argument. With `fields`, unknown options are
            overrides.
    """

    def __init__(
        self,
        prog: str,
        about: str,
        epilog: str = "",
        fields: Callable[[str | None, Mapping[str, str], Sequence[str]], Any] | None = None,
    ):
        self.options: list[str] = []
        self.verb = prog.partition(" ")[2]
        super().__init__(
            prog=prog,
            description=about[0].upper() + about[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.fields = fields
        self.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout, everything else on stderr"
        )
        self.add_argument("--debug", action="store_true", help="print tracebacks of errors")

    def add_argument(self, *names, **options):
        """Like argparse's; remembers the names."""
        self.options += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.verb}: {message}: see {self.prog} --help")

    def read(self, argv: list[str]) -> argparse.Namespace:
        """The arguments. `.changes` maps dotted names to values as text, `.options` has the names of all options,
        `.given` those that were passed.

        Raises:
            UserError: naming the invalid argument and the closest names.
        """
        words, changes = self._split(argv)
        if "-h" in words or "--help" in words:
            print(self.format_help())
            if self.fields is not None:
                print(self._fields_help([word for word in words if not word.startswith("-")], changes))
            raise SystemExit(0)
        arguments, unknown = self.parse_known_args(words)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        arguments.changes, arguments.options = changes, self.options
        arguments.given = {word.partition("=")[0] for word in words} & set(self.options)
        return arguments

    def _split(self, argv: list[str]) -> tuple[list[str], dict[str, str]]:
        """Splits off the overrides, `--name value` or `--name=value`, from the arguments for argparse."""
        words, changes, rest = [], {}, iter(argv)
        for word in rest:
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name in self.options:
                words.append(word)
                continue
            if self.fields is None:
                raise UserError(f"{self.verb}: no option {name}: {spec.nearest(name, self.options)}")
            if not equals:
                value = next(rest, None)
            if value is None or not equals and value.startswith("--"):
                near = spec.nearest(name, self.options) if "." not in name else f"write {name} VALUE"
                raise UserError(f"{self.verb}: {name} needs a value or is not an option: {near}")
            changes.pop(name[2:], None)  # the last of repeated names wins, and determines the order
            changes[name[2:]] = value
        return words, changes

    def _fields_help(self, words: list[str], changes: Mapping[str, str]) -> str:
        shown = self.fields(words[0] if words else None, changes, self.options)
        if shown is None:
            word = self._get_positional_actions()[0].metavar
            return f"To list every field that can be set: {self.prog} {word} --help"
        return "fields, set with --name value or --name=value:\n\n" + fields_table(shown)


def change(value: Any, changes: Mapping[str, str], options: Sequence[str] = ()) -> Any:
    """`value` with overrides; the error for an unknown name suggests the closest field or option."""
    known = spec.hints(type(value))
    for name in changes:
        if name.partition(".")[0] not in known:
            near = spec.nearest(f"--{name}", [*(f"--{field}" for field in known), *options])
            raise UserError(f"--{name}: neither an option nor a field of {type(value).__name__}: {near}")
    return overrides.override(value, changes)


def fields_table(value: Any) -> str:
    """Every field of a specification: its dotted name, value, type and help text, wrapped to the terminal."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    lines = []
    for name, annotation, current, text in overrides.leaves(value):
        if isinstance(current, spec.Spec):
            lines.append(f"  --{name} {type(current).__name__}")
        else:
            lines.append(f"  --{name} {spec_text(current)}")
            text = f"{text} [{spec.describe(annotation)}]".strip()
        lines += textwrap.wrap(text, width - 8, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def spec_text(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else json.dumps(spec.to_json(value))
