"""polygpt model show FILE|PRESET: exact parameter counts by part, and FLOPs per token."""

from argparse import Namespace

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser, change
from polygpt.cli.output import figure, print_table
from polygpt.errors import UserError
from polygpt.spec import nearest

EXAMPLES = """\
examples:
  polygpt model show 1b
  polygpt model show 1b --decoder.depth 24 --seq-len 4096
  polygpt model show experiments/quickstart.py --model.decoder.width 256 --json"""

LENGTH = 2048
"""Sequence length for counting a preset's attention FLOPs."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, lambda *chosen: chosen[0] and _chosen(*chosen)[0])
    words.add_argument(
        "model", metavar="FILE|PRESET", help="an experiment file, or 1m, 10m, 150m, 400m, 1b, 3b, 7b, 32b"
    )
    words.add_argument(
        "--seq-len", type=int, metavar="T", help=f"sequence length (default: the experiment's, or {LENGTH})"
    )
    return words


def _chosen(model: str, changes, options):
    """(target of the overrides, model, vocabulary, sequence length)."""
    from polygpt.models.presets import PRESETS

    if model in PRESETS:
        spec = change(PRESETS[model].model(), changes, options)
        return spec, spec, PRESETS[model].vocabulary, LENGTH
    if not model.endswith(".py"):
        raise UserError(f"model show: no preset {model!r}: {nearest(model, PRESETS)}; a file ends in .py")
    loaded = experiment.load(model, changes, options)
    return loaded, loaded.model, loaded.tokenizer.build().vocabulary, loaded.data.layout.seq_len


def run(arguments: Namespace) -> dict:
    """Prints the table; returns it as data."""
    from polygpt.models.describe import describe

    _, model, vocabulary, seq_len = _chosen(arguments.model, arguments.changes, arguments.options)
    if arguments.seq_len is not None and arguments.seq_len < 1:
        raise UserError(f"model show: --seq-len is {arguments.seq_len}: it must be positive")
    found = describe(model, vocabulary, arguments.seq_len or seq_len)
    rows = [
        [part.name, f"{part.parameters:,}", figure(part.flops / 1e6) if part.flops else "–", part.unit]
        for part in found.parts
    ]
    rows.append(["all", f"{found.parameters:,}", "", ""])
    active = "" if found.active == found.parameters else f" ({found.active:,} active)"
    title = f"{arguments.model}: {found.parameters:,} parameters{active}, vocabulary {vocabulary:,}"
    title += f", sequence length {found.seq_len:,}"
    print_table(title, ["part", "parameters", "MFLOPs forward", "for one"], rows)
    print(f"one training step: {found.flops_per_token / 1e6:,.1f} MFLOPs per text token (forward and backward)")
    if len(model.stacks()) > 1:
        print(
            "counted with both stacks at every position of a row, as they are computed: a prompt needs the encoder "
            "alone, an answer the decoder alone"
        )
    return found.to_json()
