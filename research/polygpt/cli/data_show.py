"""polygpt data show FILE|RUN: print and draw a few rows as the model sees them."""

from argparse import Namespace
from pathlib import Path

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser
from polygpt.errors import UserError
from polygpt.spec import counted

EXAMPLES = """\
examples:
  polygpt data show experiments/quickstart.py
  polygpt data show experiments/quickstart.py --all --rows 2 --picture rows.png --data.layout.packing false

Prints the beginning of the first example and draws whole rows; --all prints every position of these rows. Of a run with
train.phases, --phase chooses the one whose rows are shown."""
POSITIONS = 40
"""Largest number of positions printed without --all."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, experiment.fields)
    words.add_argument("file", metavar="FILE|RUN", help=experiment.EITHER)
    words.add_argument(
        "--rows", type=int, default=4, metavar="N", help="number of rows of the first batch to draw (default: 4)"
    )
    experiment.add_phase(words)
    words.add_argument("--all", action="store_true", help="print every position of these rows")
    words.add_argument("--picture", metavar="F", help="PNG file to write (default: runs/<name>-rows.png)")
    return words


def run(arguments: Namespace) -> dict:
    """Prints positions in tables and draws the rows; returns a summary of the rows and the path of the image."""
    if arguments.rows < 1:
        raise UserError(f"data show: --rows is {arguments.rows}: it must be positive")
    chosen = experiment.load(arguments.file, arguments.changes, arguments.options, runs=True)
    chosen, said = experiment.of_phase(chosen, arguments.phase, "data show")

    from rich.console import Console

    from polygpt.data.loader import train_batches
    from polygpt.data.show import beginning, draw, table

    tokenizer, adapters = chosen.tokenizer.build(), chosen.model.adapters
    if said:
        print(said)
    batch = next(train_batches(chosen.data, tokenizer, adapters, seed=chosen.seed))
    rows = min(arguments.rows, batch.shape[0])
    console = Console(highlight=False)
    for row in range(rows if arguments.all else 0):
        console.print(table(batch, row, tokenizer))
    if not arguments.all:
        positions = beginning(batch, 0, POSITIONS)
        console.print(table(batch, 0, tokenizer, positions))
        used = int((batch.segment_BT[:rows] > 0).sum())
        print(f"{len(positions)} of {used} positions in {counted(rows, 'row')}: --all prints every one")
    picture = Path(arguments.picture or Path("runs") / f"{chosen.name}-rows.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(batch, tokenizer, adapters, picture, rows)
    print(f"drawn: {picture}")
    shown = [
        {
            "positions": int((batch.segment_BT[row] > 0).sum()),
            "examples": int(batch.segment_BT[row].max()),
            "predicted": int((batch.weight_BT[row] > 0).sum()),
            "media": {name: int((media.length_BN[row] > 0).sum()) for name, media in batch.media.items()},
            "text": tokenizer.decode(batch.tokens_BT[row][batch.modality_BT[row] == 0]),
        }
        for row in range(rows)
    ]
    return {"length": batch.shape[1], "rows": shown, "picture": picture}
