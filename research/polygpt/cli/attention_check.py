"""polygpt attention check MODULE:SPEC: measure every property of a variant against its bound."""

from argparse import Namespace
from collections.abc import Collection

from polygpt.cli import variant
from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt attention check polygpt.attention.multi_head:MultiHead --kv_heads 1
  polygpt attention check polygpt.attention.sliding:SlidingWindow --window 8
  polygpt attention check mine.py:MyAttention --json

Tests one layer with random parameters on rows with packed examples, bidirectional spans, three modalities and padding.
Errors are relative to the largest value compared; bounds allow for rounding. Rows are longer than every integer field
of the variant up to 88. With a larger window or chunk, the ring cache or the second chunk is not exercised: set a
smaller value (--window 8) or longer rows (--positions 200). Exit code 2 if any property fails."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, variant.fields)
    words.add_argument("variant", metavar="MODULE:SPEC", help=variant.HELP)
    words.add_argument("--positions", type=int, metavar="T", help="positions per row (default: by the variant's sizes)")
    words.add_argument("--model_width", type=int, default=32, metavar="D", help="width of the model (default: 32)")
    words.add_argument("--only", metavar="NAMES", help="comma-separated properties to measure (default: all)")
    words.add_argument("--no-tpu", action="store_true", help="skip compiling for a TPU, the slowest part")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the table; returns it as data, with a `fault` if any property fails."""
    spec = variant.load(arguments.variant, arguments)

    import traceback

    from polygpt.cli.progress import Progress
    from polygpt.lab.check import BUILDS, PROPERTIES, TPU, check
    from polygpt.spec import nearest, to_json

    chosen = [name for name in PROPERTIES if name != TPU or not arguments.no_tpu]
    if arguments.only is not None:
        chosen = _names(arguments.only, PROPERTIES)
        for name in chosen:
            if name not in PROPERTIES:
                raise UserError(f"--only {name}: no such property: {nearest(name, PROPERTIES)}")
    with Progress("checking", seconds=0) as progress:
        subject, findings = check(spec, arguments.model_width, arguments.positions, chosen, progress)
    if arguments.debug:
        for finding in findings:
            if finding.exception:
                traceback.print_exception(finding.exception)
    rows = [[one.name, one.result, _number(one.error), _number(one.bound), one.note] for one in findings]
    length = subject and subject.length
    title = f"{arguments.variant}: {length or 'no'} positions, model width {arguments.model_width}"
    print_table(title, ["property", "result", "error", "bound", "note"], rows, prose=(4,))
    passed, failed = ([one.name for one in findings if one.passed is holds] for holds in (True, False))
    not_run = [one for one in findings if one.passed is None and one.note.startswith("not run")]
    summary = (
        f"{len(passed)} properties hold, {len(failed)} fail, {len(findings) - len(passed) - len(failed)} do not apply"
    )
    broken = BUILDS in failed
    remarks = ["the others cannot be measured"] if broken else [f"{one.name} was {one.note}" for one in not_run]
    print("; ".join([summary, *remarks]))
    fault = f"attention check: {arguments.variant}: fails {', '.join(failed)}"
    return {
        "spec": to_json(spec),
        "positions": length,
        "model_width": arguments.model_width,
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
