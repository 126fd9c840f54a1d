"""Inputs of the analytic estimates, computed once per experiment or mesh and shared by many candidates."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from polygpt import sharding
from polygpt.blocks.pipeline import Schedule
from polygpt.errors import UserError
from polygpt.models.functional import bind
from polygpt.parameters import paths
from polygpt.scale.plan.flops import Flops, flops
from polygpt.scale.plan.target import Target
from polygpt.sharding import MeshLayout, MeshSpec, mesh_axes
from polygpt.training.experiment import Experiment

DECODER = "decoder/"
"""Path prefix of the decoder's parameters."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A parameter: its path, the names of its axes, its shape, and whether it is a linear map, see `Traits`."""

    path: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    linear: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts that do not depend on mesh, remat or microbatches; computed by `facts`.

    Attributes:
        matrices: all parameters.
        depths: number of blocks of each stack, by path prefix of its parameters.
        optimizer: bytes of optimizer state and moving average per byte of parameters.
        flops: FLOPs of a step.
        vocabulary: vocabulary size V.
        devices: devices of the target.
    """

    matrices: tuple[Matrix, ...]
    depths: Mapping[str, int]
    optimizer: float
    flops: Flops
    vocabulary: int
    devices: tuple[jax.Device, ...]


@dataclasses.dataclass(frozen=True)
class BlockFacts:
    """Elements of one block on one device.

    Attributes:
        outputs: output elements of all its matrices per position.
        matrices: elements of its matrices after the all-gather along "width".
    """

    outputs: float
    matrices: float


@dataclasses.dataclass(frozen=True)
class MeshFacts:
    """Facts shared by all candidates on one mesh; computed by `mesh_facts`.

    Attributes:
        layout: the mesh of the target's devices.
        sharded: parameters per device.
        gathered: parameters per device after the all-gather along "width".
        blocks: elements of one block, by path prefix of the stack.
        schedule: pipeline schedule of the decoder; a single stage if there is no pipeline.
    """

    layout: MeshLayout
    sharded: float
    gathered: float
    blocks: Mapping[str, BlockFacts]
    schedule: Schedule


def facts(experiment: Experiment, target: Target) -> Facts:
    """Traces the model and the optimizer once; nothing is compiled."""
    vocabulary = experiment.tokenizer.build().vocabulary
    model = bind(experiment.model, vocabulary)
    shapes = model.abstract()
    matrices = tuple(Matrix(path, own.axes, own.shape, own.linear) for path, own in paths(model.traits).items())
    transformation = experiment.optim.build(model.traits, experiment.train.steps, model.growth)
    size = sum(matrix.size for matrix in matrices)
    leaves = jax.tree.leaves(jax.eval_shape(transformation.init, shapes))
    state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    average = 4 * size if experiment.optim.ema is not None else 0
    depths = {f"{name}/": stack.depth for name, stack in experiment.model.stacks().items()}
    for name, adapter in experiment.model.adapters.items():
        if hasattr(adapter, "tower"):
            depths[f"adapters/{name}/tower/"] = adapter.tower.depth
    counted = flops(experiment, vocabulary)
    return Facts(matrices, depths, (state + average) / (4 * size), counted, vocabulary, tuple(target.devices()))


def mesh_facts(spec: MeshSpec, known: Facts) -> MeshFacts | None:
    """The facts of a mesh of the target's devices; None if the mesh does not divide evenly."""
    try:
        layout = sharding.make_layout(spec, known.devices)
    except (UserError, NotImplementedError, ValueError):
        return None
    return MeshFacts(
        layout,
        sharded=sum(_shard(matrix, layout) for matrix in known.matrices),
        gathered=sum(_gathered(matrix, layout, "width") for matrix in known.matrices),
        blocks={prefix: _block(known, layout, prefix, max(depth, 1)) for prefix, depth in known.depths.items()},
        schedule=Schedule.of(layout) or Schedule(stages=1, repeats=1, microbatches=1),
    )


def _shard(matrix: Matrix, layout: MeshLayout) -> float:
    spec = layout.partition_spec(matrix.names, matrix.shape)
    return matrix.size / _parts(layout, [axis for entry in spec for axis in mesh_axes(entry)])


def _gathered(matrix: Matrix, layout: MeshLayout, name: str) -> float:
    """Elements per device after an all-gather along the axis with that name."""
    spec = layout.partition_spec(matrix.names, matrix.shape)
    kept = [axis for own, entry in zip(matrix.names, spec, strict=True) if own != name for axis in mesh_axes(entry)]
    return matrix.size / _parts(layout, kept)


def _block(known: Facts, layout: MeshLayout, prefix: str, depth: int) -> BlockFacts:
    held = depth / (1 if prefix.startswith("adapters/") else layout.size("layers"))  # blocks
    outputs = total = 0.0
    for matrix in known.matrices:
        if matrix.path.startswith(prefix) and matrix.linear:
            stacked = matrix.names[0] == "layers" or len(matrix.shape) == 3 and matrix.names[0] is None
            last = layout.partition_spec(matrix.names, matrix.shape)[-1]
            blocks = matrix.shape[0] if stacked else 1
            outputs += blocks * matrix.shape[-1] / _parts(layout, mesh_axes(last)) / depth
            total += _gathered(matrix, layout, "width") / held
    return BlockFacts(outputs, total)


def _parts(layout: MeshLayout, axes) -> int:
    return math.prod(layout.mesh.shape[axis] for axis in axes)
