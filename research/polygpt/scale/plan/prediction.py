"""Memory and time of a step by arithmetic alone: what a search prunes by, and never what a plan reports as its result.

Memory counts what grows with the model: the state as it is split, gradients, what the backward pass keeps of every
block, one block at work, predictions. Time counts products, what is read and written of state and activations, and the
exchanges that a split needs. Both are coarse; `Correction` takes the error of what has been compiled as that of what
has not.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from polygpt import sharding
from polygpt.blocks.pipeline import Schedule
from polygpt.errors import UserError
from polygpt.models.functional import bind, paths
from polygpt.scale.plan import links
from polygpt.scale.plan.collectives import Collective
from polygpt.scale.plan.flops import Flops, flops, remat
from polygpt.scale.plan.roofline import Roofline
from polygpt.scale.plan.target import Target
from polygpt.sharding import AXES, Layout, MeshSpec, mesh_axes
from polygpt.training.experiment import Experiment

KEPT = {"full": (1.0, 0.0), "dots": (1.0, 1.0), "none": (5.0, 2.2)}
"""By remat, what the backward pass keeps of a block for one position: multiples of the model's width, and of the sum of
its matrices' outputs. Without remat norms, rotated queries and keys, and activations are kept beside products."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A parameter: its path, the names of its axes, its shape."""

    path: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is the same for every mesh, remat and number of microbatches; `facts` finds it.

    Attributes:
        matrices: all parameters.
        optimizer: bytes of the optimizer's state and the moving average, by byte of parameters.
        flops: of a step.
        vocabulary: V.
        devices: of the target.
    """

    matrices: tuple[Matrix, ...]
    optimizer: float
    flops: Flops
    vocabulary: int
    devices: tuple[jax.Device, ...]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one way to run.

    Attributes:
        state, gradients, kept, working, head: bytes of a device, see `predict`.
        roofline: the least time of a step.
    """

    state: float
    gradients: float
    kept: float
    working: float
    head: float
    roofline: Roofline

    @property
    def temporaries(self) -> float:
        """All but the state."""
        return self.gradients + self.kept + max(self.working, self.head)


BOUNDS = ("compute", "memory", "links", "in_turn", "network")
"""The bounds of a step's time, and what exchanges take one after another: fields of a roofline."""


@dataclasses.dataclass(frozen=True)
class Correction:
    """How far predictions were off where something was compiled: factors on temporaries, and on each bound."""

    temporaries: float
    bounds: Mapping[str, float]

    def memory(self, prediction: Prediction) -> float:
        """Bytes of a device, corrected."""
        return prediction.state + self.temporaries * prediction.temporaries

    def roofline(self, prediction: Prediction) -> Roofline:
        """The bounds, corrected."""
        r = prediction.roofline
        return dataclasses.replace(r, **{name: getattr(r, name) * self.bounds[name] for name in BOUNDS})


def facts(experiment: Experiment, target: Target) -> Facts:
    """Traces the model and the optimizer once; nothing is compiled."""
    vocabulary = experiment.tokenizer.build().vocabulary
    model = bind(experiment.model, vocabulary)
    shapes = model.abstract()
    names = jax.tree.leaves(model.axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    found = zip(paths(shapes).items(), names, strict=True)
    matrices = tuple(Matrix(path, own, leaf.shape) for (path, leaf), own in found)
    transformation = experiment.optim.build(shapes, experiment.train.steps, model.growth)
    size = sum(matrix.size for matrix in matrices)
    leaves = jax.tree.leaves(jax.eval_shape(transformation.init, shapes))
    state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    average = 4 * size if experiment.optim.ema is not None else 0
    counted = flops(experiment, vocabulary)
    return Facts(matrices, (state + average) / (4 * size), counted, vocabulary, tuple(target.devices()))


def predict(experiment: Experiment, known: Facts, target: Target, layout: Layout) -> Prediction:
    """Of an experiment that differs from the one of `known` in mesh, remat, microbatches and rows alone."""
    model, data, parts = experiment.model, experiment.data, experiment.optim.accumulate
    rows = data.rows / layout.size("rows") / parts  # of a device, at a time
    positions = rows * data.layout.length / layout.size("positions")
    compute = 2 if model.dtype == "bfloat16" else 4

    own = sum(_shard(matrix, layout) for matrix in known.matrices)  # parameters of a device
    whole = sum(_without(matrix, layout, "width") for matrix in known.matrices)  # with those that it gathers
    state = own * 4 * (1 + known.optimizer)
    gradients = own * (4 * (2 if parts > 1 else 1) + (compute if compute < 4 else 0))
    stacks = {"decoder/": (model.decoder, positions)} | {
        f"adapters/{name}/tower/": (adapter.tower, rows * adapter.items * _inner(adapter))
        for name, adapter in model.adapters.items()
        if hasattr(adapter, "tower")
    }
    kept = working = passed = 0.0
    for prefix, (stack, at) in stacks.items():
        outputs, matrices = _block(known, layout, prefix, max(stack.depth, 1))
        width = stack.width / layout.size("features")
        each = {name: compute * (a * width + b * outputs) for name, (a, b) in KEPT.items()}
        kept += at * stack.depth / layout.size("stages") * each[stack.remat]
        working = max(working, 2 * at * each["none"] + matrices * (2 * compute + 4))
        passed += at * stack.depth * each["none"] * (3 + (stack.remat == "full")) * parts
    head = positions * known.vocabulary / layout.size("vocabulary") * 4 * 3
    passed += 3 * (own * 4 * (2 + known.optimizer)) + whole * compute * 6 * parts + 2 * head * parts

    counted = remat(known.flops, model)
    scores = sum(line.forward for line in counted.lines if line.name == "decoder, attention")
    schedule = Schedule.of(layout)
    bubble = schedule.bubble() if schedule else 0.0  # in which a stage computes what nobody uses
    blocks = sum(line.forward * (3 + line.again) for line in counted.lines if line.name.startswith("decoder, "))
    wasted = (blocks + 1.7 * scores) * bubble / (1 - bubble)
    executed = (counted.useful + counted.again + 1.7 * scores + wasted) / target.count
    exchanged = _exchanges(experiment, known, layout, positions, own, whole, compute)
    linked = links.total(exchanged, target, list(layout.mesh.devices.flat))
    roofline = Roofline(
        compute=executed / target.peak if target.peak else 0.0,
        memory=passed / target.chip.each(target.chip.bandwidth) if target.peak else 0.0,
        links=linked.busiest,
        in_turn=linked.in_turn,
        network=linked.network,
        useful=counted.useful / target.count,
        executed=executed,
        peak=target.peak or 0.0,
    )
    return Prediction(state, gradients, kept, working, head, roofline)


def arranged(spec: MeshSpec, known: Facts) -> Layout | None:
    """The mesh of the target's devices; None where it does not come out even."""
    try:
        return sharding.arrange(spec, known.devices)
    except (UserError, NotImplementedError, ValueError):
        return None


def _exchanges(experiment, known: Facts, layout: Layout, positions, own, whole, compute) -> list[Collective]:
    """What a split needs at least: gathered and scattered parameters, sums of activations and of gradients."""
    model, parts, sizes = experiment.model, experiment.optim.accumulate, dict(layout.mesh.shape)
    decoder = model.decoder
    D, L, again = decoder.width, decoder.depth, decoder.remat == "full"
    found = []

    def add(kind: str, axes: tuple[str, ...], payload: float, times: float) -> None:
        if payload and (group := _group(layout, axes)):
            found.append(Collective(kind, axes, group, payload, round(times), "", "", True))

    sharded = tuple(axis for axis in layout.spec.rules["width"] if sizes[axis] > 1)
    add("all-gather", sharded, whole * compute / L, 2 * L * parts)
    add("reduce-scatter", sharded, whole * compute / L, L * parts)
    rest = tuple(axis for axis in ("data", "expert", "sequence") if sizes[axis] > 1 and axis not in sharded)
    add("all-reduce", rest, own * 4, parts)
    stream = positions * D * compute
    add("all-reduce", ("tensor",) if sizes["tensor"] > 1 else (), stream, L * (4 + 2 * again) * parts)
    if sizes["sequence"] > 1:
        keys = sum(m.shape[-1] for m in known.matrices if m.path.startswith("decoder/") and "kv_heads" in m.names)
        keys /= max(len(decoder.period()), 1) * layout.size("kv_heads")
        gathered = positions * sizes["sequence"] * keys * compute
        add("all-gather", ("sequence",), gathered, L * (2 + again) * parts)
    if sizes["expert"] > 1:
        add("all-to-all", ("expert",), stream * getattr(decoder.mlp, "top_k", 1), L * (4 + 2 * again) * parts)
    return found


def _group(layout: Layout, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The numbers, in the order of the mesh, of the first device and those that differ from it along `axes`."""
    if not axes:
        return ()
    numbers = np.arange(layout.mesh.devices.size).reshape(layout.mesh.devices.shape)
    return tuple(numbers[tuple(slice(None) if axis in axes else 0 for axis in AXES)].ravel().tolist())


def _shard(matrix: Matrix, layout: Layout) -> float:
    spec = layout.axes(matrix.names, matrix.shape)
    return matrix.size / _parts(layout, [axis for entry in spec for axis in mesh_axes(entry)])


def _without(matrix: Matrix, layout: Layout, name: str) -> float:
    """Elements of a device once it has gathered the axis of that name."""
    spec = layout.axes(matrix.names, matrix.shape)
    kept = [axis for own, entry in zip(matrix.names, spec, strict=True) if own != name for axis in mesh_axes(entry)]
    return matrix.size / _parts(layout, kept)


def _block(known: Facts, layout: Layout, prefix: str, depth: int) -> tuple[float, float]:
    """(elements of all matrices' outputs for a position, elements of all matrices), of one block on one device."""
    outputs = total = 0.0
    for matrix in known.matrices:
        if matrix.path.startswith(prefix) and matrix.path.endswith("kernel"):
            stacked = matrix.names[0] == "layers" or len(matrix.shape) == 3 and matrix.names[0] is None
            last = layout.axes(matrix.names, matrix.shape)[-1]
            blocks = matrix.shape[0] if stacked else 1
            outputs += blocks * matrix.shape[-1] / _parts(layout, mesh_axes(last)) / depth
            total += _without(matrix, layout, "width") / depth
    return outputs, total


def _inner(adapter) -> int:
    """Positions of an item inside its tower."""
    return adapter.applications.get("tower", adapter.positions)


def _parts(layout: Layout, axes) -> int:
    return math.prod(layout.mesh.shape[axis] for axis in axes)
