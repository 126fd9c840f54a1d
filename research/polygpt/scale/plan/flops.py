"""FLOPs of a training step, by an explicit formula."""

import dataclasses
import math
from collections.abc import Mapping

from polygpt.attention.kernels.dispatch import LONG, compiling_for
from polygpt.attention.zigzag import largest_share
from polygpt.models.decoder import DecoderSpec
from polygpt.models.describe import describe, scores
from polygpt.models.multimodal import ModelSpec
from polygpt.sharding import MeshSpec
from polygpt.training.experiment import Experiment

FORMULA = """\
A multiply-add counts as 2 FLOPs. Useful FLOPs per step are 3 x the forward pass: the backward pass computes each matrix
product twice, for the gradients of its input and of its weights. Forward pass, for R rows of T positions:
  matrices      2 n for each of the R T positions; n is the number of parameters in matrices of the decoder blocks. For
                a mixture of experts, only the experts that a position is routed to count
  attention     2 d + 2 e per position, head and visible key, where d and e are the widths of queries and values. If a
                row is one example, (T + 1) / 2 keys on average: the exact causal half including the diagonal. Packed
                rows see fewer; a window sees at most its width
  head          2 D V per position
  towers        for every item slot of every row, used or not, since the program computes them all: 2 n P for matrices
                applied at P positions, and attention among all positions of an item
Not counted: norms, biases, rotary embeddings, softmax, activation functions, embedding lookups, loss and optimizer.
Recomputed by remat, and not useful: the forward pass of blocks with remat "full", and decoder attention with remat
"full" or "dots". This is the formula's value, not a bound: the compiler removes recomputation whose result is unused,
and a program does other work as well. Attention kernels compute whole blocks, including the upper half of diagonal
blocks and padding; their two backward kernels compute seven products where four are useful. Scores that are computed
as a matrix include the upper half."""
"""The formula, printed with its result."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A part of the model.

    Attributes:
        name: "decoder, matrices", ...
        each: forward FLOPs per unit.
        unit: "position" or "item".
        units: units per step.
        again: fraction recomputed in the backward pass.
    """

    name: str
    each: float
    unit: str
    units: int
    again: float = 0.0

    @property
    def forward(self) -> float:
        """Forward FLOPs per step."""
        return self.each * self.units


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs per step, summed over all devices.

    Attributes:
        lines: the parts of the model.
        positions: positions per step, R T.
    """

    lines: tuple[Line, ...]
    positions: int

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return sum(line.forward for line in self.lines)

    @property
    def useful(self) -> float:
        """FLOPs of forward and backward pass without recomputation, the numerator of MFU."""
        return 3 * self.forward

    @property
    def again(self) -> float:
        """FLOPs recomputed by remat according to the formula; the program may recompute more or less."""
        return sum(line.forward * line.again for line in self.lines)

    def to_json(self) -> dict:
        """As JSON data."""
        lines = [dataclasses.asdict(line) | {"forward": line.forward} for line in self.lines]
        totals = {"forward": self.forward, "useful": self.useful, "again": self.again, "positions": self.positions}
        return totals | {"lines": lines, "formula": FORMULA}


def flops(experiment: Experiment, vocabulary: int) -> Flops:
    """FLOPs per step of an experiment. Allocates no arrays."""
    model, seq_len, rows = experiment.model, experiment.data.layout.seq_len, experiment.data.batch_size
    positions, lines = rows * seq_len, []
    for part in describe(model, vocabulary, seq_len).parts:
        if not part.flops:
            continue
        if part.unit == "item":
            items = rows * model.adapters[part.name.rpartition("/")[2]].items
            lines.append(Line(part.name, part.flops, "item", items))
        elif part.name in model.stacks():
            attention = scores(model.stacks()[part.name], seq_len)
            lines.append(Line(f"{part.name}, matrices", part.flops - attention, "position", positions))
            lines.append(Line(f"{part.name}, attention", attention, "position", positions))
        else:
            name = "head (tied)" if part.name == "text" else part.name
            lines.append(Line(name, part.flops, "position", positions))
    return remat(Flops(tuple(lines), positions), model)


def causal_share(experiment: Experiment, sizes: Mapping[str, int], platform: str) -> float:
    """The decoder's attention on the busiest device, relative to the mean of those that split the positions of a row.

    1 if the order of positions is a zigzag; close to 2 if many devices hold successive positions, of which the last see
    most keys. `sizes` are those of the mesh axes; `platform` decides on the automatic order. Assumes full rows and a
    backend that skips what is masked, as all do but those of short rows.
    """
    mesh, seq_len = experiment.train.mesh, experiment.data.layout.seq_len
    devices = math.prod(sizes.get(axis, 1) for axis in mesh.rules["positions"])
    busiest = mean = 0.0
    for stack in experiment.model.stacks().values():
        work = stack.causal_score_flops(seq_len) * seq_len
        split = devices > 1 and seq_len >= LONG and stack.mask != "bidirectional"
        mean += work
        with compiling_for(platform):
            busiest += work * (_busiest(stack, mesh, devices, seq_len) if split else 1.0)
    return busiest / mean if mean else 1.0


def _busiest(stack: DecoderSpec, mesh: MeshSpec, devices: int, seq_len: int) -> float:
    def total(length: int) -> float:
        return stack.causal_score_flops(length) * length if length else 0.0

    return largest_share(total, seq_len, devices, stack.zigzag(mesh, devices, seq_len))


def remat(flops: Flops, model: ModelSpec) -> Flops:
    """The same FLOPs, with the recomputed fractions set by the model's remat policies."""

    def again(name: str) -> float:
        stack, _, kind = name.partition(", ")
        if kind:
            remat = model.stacks()[stack].remat
            return float(remat == "full" or kind == "attention" and remat == "dots")
        adapter = model.adapters.get(name.rpartition("/")[2])
        return float(getattr(getattr(adapter, "tower", None), "remat", "none") == "full")

    lines = (dataclasses.replace(line, again=again(line.name)) for line in flops.lines)
    return dataclasses.replace(flops, lines=tuple(lines))
