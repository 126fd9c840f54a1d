"""FLOPs of a training step, by an explicit formula."""

import dataclasses

from polygpt.models.describe import describe
from polygpt.models.multimodal import ModelSpec
from polygpt.training.experiment import Experiment

FORMULA = """\
A multiply-add is 2 FLOPs. A step's useful FLOPs are 3 x its forward pass: the backward pass takes each product twice,
once for the gradient of its input and once for that of its matrix. Forward, of R rows of T positions:
  matrices      2 n for each of the R T positions, n the parameters in matrices of the decoder's blocks; of a mixture of
                experts only those of the experts that a position goes through
  attention     for each position and head 2 d + 2 e for every key it sees, d and e the widths of queries and values:
                (T + 1) / 2 keys on average, the exact causal half with its diagonal, if a row is one example; packed
                rows see less, a window its width and at the beginning of a row what there is
  head          2 D V for each position
  towers        for every item slot of every row, used or not, as the program computes them: 2 n P for the matrices
                applied at P positions, and attention over all of an item
Left out: norms, biases, rotations, softmax, activations, embedding look-ups, loss and optimizer.
Recomputed by remat, and not useful: the forward pass of blocks whose remat is full; of the decoder's attention,
where remat is full or dots. It is what the formula gives, no bound: the compiler leaves out what it finds unused, and a
program computes more beside it. Attention kernels compute whole blocks, on the diagonal too and where positions are
filled up to one, and the two of their backward pass take seven products where four are useful; scores that are
computed as a matrix have their upper half."""
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
            items = rows * model.adapters[part.name.partition("/")[2]].items
            lines.append(Line(part.name, part.flops, "item", items))
        elif part.name == "decoder":
            scores = round(model.decoder.causal_score_flops(seq_len))
            lines.append(Line("decoder, matrices", part.flops - scores, "position", positions))
            lines.append(Line("decoder, attention", scores, "position", positions))
        else:
            name = "head (tied)" if part.name == "text" else part.name
            lines.append(Line(name, part.flops, "position", positions))
    return remat(Flops(tuple(lines), positions), model)


def remat(flops: Flops, model: ModelSpec) -> Flops:
    """The same FLOPs, with the recomputed fractions set by the model's remat policies."""

    def again(name: str) -> float:
        if name == "decoder, attention":
            return float(model.decoder.remat != "none")
        if name == "decoder, matrices":
            return float(model.decoder.remat == "full")
        adapter = model.adapters.get(name.partition("/")[2])
        return float(getattr(getattr(adapter, "tower", None), "remat", "none") == "full")

    lines = (dataclasses.replace(line, again=again(line.name)) for line in flops.lines)
    return dataclasses.replace(flops, lines=tuple(lines))
