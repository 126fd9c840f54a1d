"""polygpt attention bench MODULE:SPEC: time, memory and FLOPs of a variant by sequence length."""

import dataclasses
from argparse import Namespace
from pathlib import Path

from polygpt.cli import named, variant
from polygpt.cli.arguments import Parser
from polygpt.cli.output import print_table
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt attention bench polygpt.attention.sliding:SlidingWindow --against polygpt.attention.multi_head:MultiHead
  polygpt attention bench mine.py:Mine --lengths 256,1024,4096 --model_width 512 --heads 8
  polygpt attention bench polygpt.attention.sliding:SlidingWindow --window 1024 --lengths 4096,16384
  polygpt attention bench mine.py:Mine --heads 4 --against mine.py:Mine --against.heads 8

Times are medians of interleaved runs, with the fastest and the slowest: compare within a table, not across tables. Peak
memory (without parameters) and moved MB are those of the compiled program. FLOPs are given twice: by formula (the
projections plus the variant's score_flops() for a causal sequence) and as counted by XLA in the compiled program, where
a materialised matrix counts in full, masked pairs included. A + marks a count that is too low: XLA counts a loop body
once and a fused kernel hardly at all. Decode steps have neither; a note says if the two counts differ by half there."""

AGAINST = "against."
"""Prefix of fields of the other variant."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, variant.fields)
    words.add_argument("variant", metavar="MODULE:SPEC", help=variant.HELP)
    words.add_argument(
        "--against", metavar="OTHER", help="another variant to compare with; --against.NAME VALUE sets its fields"
    )
    words.add_argument("--lengths", default="256,512,1024,2048", metavar="T,T,...", help="(default: %(default)s)")
    words.add_argument("--model_width", type=int, default=256, metavar="D", help="(default: %(default)s)")
    words.add_argument("--batch-size", type=int, default=1, metavar="B", help="(default: %(default)s)")
    words.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    words.add_argument(
        "--picture", metavar="F", help="the picture to draw (default: runs/<names and fields>-bench.png)"
    )
    return words


def run(arguments: Namespace) -> dict:
    """Measures, prints a table and plots it; returns the costs as data."""
    try:
        lengths = tuple(int(length) for length in arguments.lengths.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 2 or min(arguments.model_width, arguments.batch_size) < 1:
        raise UserError(
            "attention bench: --lengths takes numbers above 1 like 256,1024; --model_width, --batch-size above 0"
        )
    specs, remarks = _specs(arguments)

    import jax

    from polygpt.cli.progress import Progress
    from polygpt.lab import bench
    from polygpt.lab.picture import writable

    named = variant.picture([arguments.variant, arguments.against], arguments, "bench")
    picture = writable(Path(arguments.picture or named))
    costs, rows = [], []
    measured = bench.compare(specs, lengths, arguments.model_width, arguments.batch_size, arguments.dtype)
    with Progress("measuring") as progress:
        for done, found in enumerate(measured, start=1):
            costs += found
            progress(f"T {found[0].length}, {found[0].kind}", done, len(lengths) * len(bench.KINDS))
            for i, cost in enumerate(found):
                ratio = f"{found[0].seconds / cost.seconds:.2f}" if i else ""
                cells = [f"{cost.length:,}", cost.kind, cost.variant, f"{1e3 * cost.seconds:,.2f}"]
                cells += [f"{1e3 * cost.fastest:,.2f} to {1e3 * cost.slowest:,.2f}", ratio, f"{cost.megabytes:,.1f}"]
                more = "" if cost.whole else "+"
                cells += [f"{cost.moved:,.1f}{more}", bench.flops_text(1e9 * cost.gflops)]
                rows.append([*cells, f"{bench.flops_text(1e9 * cost.counted)}{more}"])
    columns = ["T", "pass", "variant", "ms", "fastest to slowest", "relative speed", "peak MB", "moved MB"]
    columns += ["FLOPs, formula", "compiled"]
    device = jax.devices()[0].device_kind
    title = f"width {arguments.model_width}, "
    title += f"batch size {arguments.batch_size}, {arguments.dtype}, {device}, jax {jax.__version__}"
    print_table(title, columns, rows)
    if not all(cost.whole for cost in costs):
        print("+: or more; the compiler counts the body of a loop once, and fused kernels hardly at all")
    if len(specs) > 1:
        print(f"relative speed: that of {next(iter(specs))} is 1")
    remarks += bench.doubts(costs)
    print("".join(f"{remark}\n" for remark in remarks), end="")
    bench.plot(costs, picture, title)
    print(f"drawn: {picture}")
    found = [dataclasses.asdict(cost) for cost in costs]
    return {"costs": found, "remarks": remarks, "device": device, "picture": picture}


def _specs(arguments: Namespace) -> tuple[dict, list[str]]:
    """The variants by their names in the table, and notes about their differences."""
    name = arguments.variant.rpartition(":")[2]
    specs, others = {name: variant.load(arguments.variant, arguments)}, named.fields_of(AGAINST, arguments.changes)
    if not arguments.against:
        if others:
            field = next(iter(others))
            raise UserError(f"attention bench: --{AGAINST}{field} sets a field of --against OTHER, which is missing")
        return specs, []
    other = arguments.against.rpartition(":")[2]
    other = other if other != name else f"{other} (against)"
    specs[other] = variant.load(arguments.against, arguments, AGAINST)
    own, rival = (vars(spec) for spec in specs.values())
    differing = [field for field in own if field in rival and own[field] != rival[field]]
    return specs, [f"{name} and {other} differ in {field}: {own[field]} and {rival[field]}" for field in differing]
