"""What `attention check` and `objective check` share: the choice of properties, and the table of what was found."""

import traceback
from argparse import Namespace
from collections.abc import Collection
from typing import Any

from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table
from polygpt.errors import UserError


def add_only(words: Parser) -> None:
    """Adds the option that chooses properties."""
    words.add_argument("--only", metavar="NAMES", help="comma-separated properties to measure (default: all)")


def chosen(arguments: Namespace, known: Collection[str], left_out: str | None = None) -> list[str]:
    """The properties to measure: those of `--only`, or all but `left_out`. Raises UserError for an unknown name."""
    from polygpt.spec import nearest

    if arguments.only is None:
        return [name for name in known if name != left_out]
    names = _names(arguments.only, known)
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such property: {nearest(name, known)}")
    return names


def show(verb: str, name: str, size: str, findings: Collection, basis: str, debug: bool) -> dict[str, Any]:
    """Prints the table and a summary; returns the findings as data, with a `fault` if a property fails.

    Args:
        verb: such as "attention check".
        name: what was checked.
        size: of what it was checked on.
        findings: a collection of `lab.findings.Finding`.
        basis: the name of the property without which no other can be measured.
        debug: whether to print tracebacks.
    """
    for finding in findings:
        if debug and finding.exception:
            traceback.print_exception(finding.exception)
    rows = [[one.name, one.result, _number(one.error), _number(one.bound), one.note] for one in findings]
    print_table(f"{name}: {size}", ["property", "result", "error", "bound", "note"], rows, prose=(4,))
    passed, failed = ([one.name for one in findings if one.passed is holds] for holds in (True, False))
    not_run = [one for one in findings if one.passed is None and one.note.startswith("not run")]
    summary = (
        f"{len(passed)} properties hold, {len(failed)} fail, {len(findings) - len(passed) - len(failed)} do not apply"
    )
    broken = basis in failed
    remarks = ["the others cannot be measured"] if broken else [f"{one.name} was {one.note}" for one in not_run]
    print("; ".join([summary, *remarks]))
    fault = f"{verb}: {name}: fails {', '.join(failed)}"
    return {
        "findings": [one.to_json() for one in findings],
        "fault": (f"{fault}: {findings[0].note}" if broken else fault) if failed else None,
    }


def _names(text: str, known: Collection[str]) -> list[str]:
    """The names in a text that separates them by commas, which some known names have themselves."""
    parts, names = [part.strip() for part in text.split(",")], []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if ", ".join(parts[:n]) in known), 1)
        names.append(", ".join(parts[:count]))
        parts = parts[count:]
    return names


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value else "0"
