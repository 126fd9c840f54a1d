"""polygpt attention show MODULE:SPEC: draw the mask for a row of a given layout, and the blocks that a kernel skips."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli import variant
from polygpt.cli.arguments import Parser
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt attention show polygpt.attention.multi_head:MultiHead
  polygpt attention show polygpt.attention.sliding:SlidingWindow --window 8 --layout "9 image:9 3 | 6 audio:6 pad:3"
  polygpt attention show mine.py:Mine --block-size 16 --picture mine.png

A layout describes one row: packed examples separated by "|"; a number means that many text positions, NAME:N a media
item of N positions, pad:N padding. Text is modality 0; media are numbered from 1 in order of appearance, regardless of
name: if the variant distinguishes them, list them in the order of the model's adapters. Up to 1,024 positions every
pair is drawn, beyond that only blocks: choose a --block-size that gives about a hundred of them. Data-dependent
selection, such as top-k blocks of keys, is not part of the mask: the module is tried on random inputs, and a note says
if pairs that are drawn have no influence."""

LAYOUT = "6 image:9 8 | 14 audio:6 3 | pad:2"
WIDEST = 64
"""The longest row that is also drawn as text."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, variant.fields)
    words.add_argument("variant", metavar="MODULE:SPEC", help=variant.HELP)
    words.add_argument("--layout", default=LAYOUT, metavar="TEXT", help='the row (default: "%(default)s")')
    words.add_argument(
        "--causal_media", action="store_true", help="attend causally within media (default: bidirectionally)"
    )
    words.add_argument(
        "--block-size", type=int, default=8, metavar="N", help="positions per kernel block (default: %(default)s)"
    )
    words.add_argument("--picture", metavar="F", help="the picture to draw (default: runs/<name and fields>-mask.png)")
    return words


def run(arguments: Namespace) -> dict:
    """Draws mask and block map; returns their counts and the path of the picture."""
    from polygpt.attention.kernels.block_map import count
    from polygpt.lab import drawing, probe
    from polygpt.lab.picture import writable
    from polygpt.lab.subject import seen_by

    if arguments.block_size < 1:
        raise UserError(f"attention show: --block-size is {arguments.block_size}: it must be positive")
    spec = variant.load(arguments.variant, arguments)
    name = arguments.variant.rpartition(":")[2]
    picture = writable(Path(arguments.picture or variant.picture([arguments.variant], arguments, "mask")))
    mask = seen_by(spec)
    row = drawing.read_row(arguments.layout, not arguments.causal_media, mask.labels())
    if row.length <= WIDEST:
        print(drawing.text_picture(mask, row))
    found, exact = drawing.blocks(mask, row, arguments.block_size)
    seen = drawing.seen(mask, row)
    print("modalities: " + ", ".join(f"{medium} {number}" for number, medium in enumerate(row.names)))
    print(f"{name}: {seen:,} of {row.length**2:,} pairs are visible; blocks of {arguments.block_size}: {count(found)}")
    remark = probe.remark(spec, mask, row)
    print(f"note: {remark}\n" if remark else "", end="")
    drawing.draw(mask, row, arguments.block_size, picture, f"{name}, {arguments.layout}")
    print(f"drawn: {picture}")
    counts = {"map": vars(count(found)), "exact": vars(count(exact))}
    said = {"positions": row.length, "modalities": row.names, "seen": seen, "blocks": counts}
    return {**said, "remark": remark, "picture": picture}
