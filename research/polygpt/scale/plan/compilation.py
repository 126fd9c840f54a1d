"""The training step of an experiment, compiled ahead of time for devices that need not be there."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from polygpt import topology
from polygpt.attention.kernels import dispatch
from polygpt.data.packing import POSITION_ARRAYS
from polygpt.scale.plan import memory
from polygpt.scale.plan.memory import Exhausted, Memory
from polygpt.scale.plan.target import Target
from polygpt.sequence import Batch, Media
from polygpt.training.experiment import Experiment
from polygpt.training.parallel import Parallel
from polygpt.training.program import Program, assemble


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled step.

    Attributes:
        compiled: the program; None where it did not fit.
        memory: of a device; None where the compiler refused for want of it.
        exhausted: what the compiler said then.
        seconds: that tracing and compiling took.
        mesh: devices along each axis.
        reason: why this mesh, where `train.parallel` is "auto".
        vocabulary: V.
        devices: the order of the mesh's devices.
    """

    compiled: jax.stages.Compiled | None
    memory: Memory | None
    exhausted: Exhausted | None
    seconds: float
    mesh: dict[str, int]
    reason: str | None
    vocabulary: int
    devices: list[jax.Device]


def build(experiment: Experiment, target: Target) -> Built:
    """Compiles the step of an experiment for a target. No data is read and no parameter made.

    An experiment for one device, or for pmap, is planned as a sharded program: for one device nothing is split, and
    pmap computes what the data axis does.

    Raises:
        UserError: rows, positions or heads cannot be divided as the mesh asks.
    """
    begin = time.perf_counter()
    program = prepare(experiment, target)
    runs = program.parallel
    state, batch = runs.abstract(program.initial), abstract_batch(experiment, runs)
    mesh = runs.layout.mesh if runs.layout else jax.sharding.Mesh(runs.devices, ("data",))
    exceeded = compiled = None
    with dispatch.compiling_for(target.traced), jax.set_mesh(mesh):  # Pallas asks the mesh what kind of TPU it is
        lowered = program.step.lower(state, batch)
    try:
        compiled = topology.compiled(lowered)
    except jax.errors.JaxRuntimeError as error:
        exceeded = memory.exhausted(error)
        if exceeded is None:
            raise
    return Built(
        compiled=compiled,
        memory=memory.of(compiled, state, batch, target.usable) if compiled else None,
        exhausted=exceeded,
        seconds=time.perf_counter() - begin,
        mesh=dict(mesh.shape),
        reason=program.reason,
        vocabulary=program.model.vocabulary,
        devices=list(mesh.devices.flat),
    )


def prepare(experiment: Experiment, target: Target) -> Program:
    """The program that would run, traced by nobody yet."""
    train = experiment.train
    if train.parallel == "pmap":
        experiment = experiment.replace(train=train.replace(parallel="sharded"))
    vocabulary = experiment.tokenizer.build().vocabulary
    return assemble(experiment, vocabulary, target.devices(), memory=int(target.usable))


def abstract_batch(experiment: Experiment, runs: Parallel) -> Batch:
    """Shapes and places of a batch as the loader would give it."""
    B, T = experiment.data.rows, experiment.data.layout.length

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        rows = ("rows", *[None] * (len(shape) - 1))
        place = runs.layout.place(rows, shape) if runs.layout else SingleDeviceSharding(runs.devices[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    arrays = {name: array((B, T)) for name in POSITION_ARRAYS.values()}
    arrays |= {"modality_BT": array((B, T), jnp.int8), "weight_BT": array((B, T), jnp.float32)}
    media = {
        name: Media(array((B, adapter.items, *adapter.features.shape), jnp.float32), array((B, adapter.items)))
        for name, adapter in experiment.model.adapters.items()
    }
    return Batch(**arrays | {"coordinate_BT3": array((B, T, 3))}, media=media)
