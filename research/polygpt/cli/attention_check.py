"""polygpt attention check MODULE:SPEC: measure every property of a variant against its bound."""

from argparse import Namespace

from polygpt.cli import findings, variant
from polygpt.cli.arguments import Parser

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
    findings.add_only(words)
    words.add_argument("--no-tpu", action="store_true", help="skip compiling for a TPU, the slowest part")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the table; returns it as data, with a `fault` if any property fails."""
    spec = variant.load(arguments.variant, arguments)

    from polygpt.cli.progress import Progress
    from polygpt.lab.check import BUILDS, PROPERTIES, TPU, check
    from polygpt.spec import to_json

    chosen = findings.chosen(arguments, PROPERTIES, TPU if arguments.no_tpu else None)
    with Progress("checking", seconds=0) as progress:
        subject, found = check(spec, arguments.model_width, arguments.positions, chosen, progress)
    length = subject and subject.length
    size = f"{length or 'no'} positions, model width {arguments.model_width}"
    shown = findings.show("attention check", arguments.variant, size, found, BUILDS, arguments.debug)
    return {"spec": to_json(spec), "positions": length, "model_width": arguments.model_width, **shown}
