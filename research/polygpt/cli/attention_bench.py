"""polygpt attention bench MODULE:SPEC: time, memory and FLOPs of a variant over the length of the row."""

import dataclasses
from argparse import Namespace
from pathlib import Path

from polygpt.cli import variant
from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt attention bench polygpt.attention.sliding:SlidingWindow --against polygpt.attention.multi_head:MultiHead
  polygpt attention bench mine.py:Mine --lengths 256,1024,4096 --model_width 512 --heads 8
  polygpt attention bench polygpt.attention.sliding:SlidingWindow --window 1024 --lengths 4096,16384

Peak memory is the compiled program's: temporaries and results, without parameters. Times are medians of interleaved
runs: compare within one table, not between two."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, variant.fields)
    words.add_argument(
        "variant", metavar="MODULE:SPEC", help="the variant, or FILE.py:CLASS; its fields are set by --name value"
    )
    words.add_argument("--against", metavar="OTHER", help="another variant, with its defaults, to compare with")
    words.add_argument("--lengths", default="256,512,1024,2048", metavar="T,T,...", help="(default: %(default)s)")
    words.add_argument("--model_width", type=int, default=256, metavar="D", help="(default: %(default)s)")
    words.add_argument("--rows", type=int, default=1, metavar="B", help="(default: %(default)s)")
    words.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    words.add_argument("--picture", metavar="F", help="the picture to draw (default: runs/attention-bench.png)")
    return words


def run(arguments: Namespace) -> dict:
    """Measures, prints a table and draws it; returns the costs as data."""
    try:
        lengths = tuple(int(length) for length in arguments.lengths.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 2 or min(arguments.model_width, arguments.rows) < 1:
        raise UserError("attention bench: --lengths takes numbers above 1 like 256,1024; --model_width, --rows above 0")
    own = variant.load(arguments.variant, arguments.changes, arguments.options)
    specs = {arguments.variant.rpartition(":")[2]: own}
    if arguments.against:
        name = arguments.against.rpartition(":")[2]
        specs[name if name not in specs else f"{name} (defaults)"] = variant.load(arguments.against)

    import jax

    from polygpt.cli.progress import Progress
    from polygpt.lab import bench
    from polygpt.lab.picture import writable

    picture = writable(Path(arguments.picture or "runs/attention-bench.png"))
    costs, rows = [], []
    measured = bench.compare(specs, lengths, arguments.model_width, arguments.rows, arguments.dtype)
    with Progress("measuring") as progress:
        for done, found in enumerate(measured, start=1):
            costs += found
            progress(f"T {found[0].length}, {found[0].kind}", done, len(lengths) * len(bench.KINDS))
            for i, cost in enumerate(found):
                ratio = f"{found[0].seconds / cost.seconds:.2f}" if i else ""
                cells = [f"{cost.length:,}", cost.kind, cost.variant, f"{1e3 * cost.seconds:,.2f}", ratio]
                rows.append([*cells, f"{cost.megabytes:,.1f}", f"{cost.gflops:,.3f}"])
    columns = ["T", "pass", "variant", "ms", "first / this", "peak MB", "GFLOPs"]
    device = jax.devices()[0].device_kind
    title = f"width {arguments.model_width}, {arguments.rows} rows, {arguments.dtype}, {device}, jax {jax.__version__}"
    print_table(title, columns, rows)
    bench.plot(costs, picture, title)
    print(f"drawn: {picture}")
    return {"costs": [dataclasses.asdict(cost) for cost in costs], "device": device, "picture": picture}
