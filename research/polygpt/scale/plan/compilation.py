"""The training step of an experiment, compiled ahead of time for devices that need not be there."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from polygpt import topology
from polygpt.attention.kernels import dispatch
from polygpt.data.packing import POSITION_ARRAYS
from polygpt.scale.plan import kept, memory
from polygpt.scale.plan.kept import Kept
from polygpt.scale.plan.memory import Exhausted, Memory
from polygpt.scale.plan.target import Target
from polygpt.sequence import Batch, Media
from polygpt.training.experiment import Experiment
from polygpt.training.parallel import Parallel
from polygpt.training.program import Program, assemble

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that change what a compiler makes of a program."""
SETTINGS = tuple(
    f"jax_{name}"
    for name in (
        "exec_time_optimization_effort",
        "memory_fitting_effort",
        "optimization_level",
        "memory_fitting_level",
        "disable_most_optimizations",
    )
    if f"jax_{name}" in jax.config.values
)
"""JAX's settings that do."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled step.

    Attributes:
        text: of the compiled program; None where it did not fit.
        memory: of a device; None where the compiler refused for want of it.
        exhausted: what the compiler said then.
        seconds: that compiling took, when it was done.
        mesh: devices along each axis.
        reason: why this mesh, where `train.parallel` is "auto".
        vocabulary: V.
        devices: the order of the mesh's devices.
    """

    text: str | None
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
    step = lower(experiment, target)
    made = _compiled(step, target)
    return Built(
        text=made.text,
        memory=memory.of(made.figures, step.state, step.batch, target.usable) if made.text else None,
        exhausted=None if made.text else memory.exhausted(made.refusal),
        seconds=made.seconds,
        mesh=dict(step.mesh.shape),
        reason=step.program.reason,
        vocabulary=step.program.model.vocabulary,
        devices=list(step.mesh.devices.flat),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """A step traced for its devices: the program it is of, its arguments' shapes and places, and the mesh."""

    program: Program
    lowered: jax.stages.Lowered
    state: Any
    batch: Batch
    mesh: jax.sharding.Mesh


def lower(experiment: Experiment, target: Target) -> Step:
    """Traces the step of an experiment. Errors as `build`."""
    program = prepare(experiment, target)
    runs = program.parallel
    state, batch = runs.abstract(program.initial), abstract_batch(experiment, runs)
    mesh = runs.layout.mesh if runs.layout else jax.sharding.Mesh(runs.devices, ("data",))
    with dispatch.compiling_for(target.traced), jax.set_mesh(mesh):  # Pallas asks the mesh what kind of TPU it is
        with _without_traces():
            return Step(program, program.step.lower(state, batch), state, batch, mesh)


def _compiled(step: Step, target: Target) -> Kept:
    """What the compiler makes of it, or made of it before."""
    where = [target.name, str(target.slices), repr([device.id for device in step.mesh.devices.flat])]
    told = {name: os.environ.get(name) for name in FLAGS} | {name: jax.config.values[name] for name in SETTINGS}
    path = kept.place([step.lowered.as_text(), *where, json.dumps([versions(), told], sort_keys=True)])
    if (found := kept.read(path)) is not None:
        return found
    begin, text, figures, refusal = time.perf_counter(), None, {}, ""
    try:
        compiled = topology.compiled(step.lowered)
        text, analysis = compiled.as_text(), compiled.memory_analysis()
        figures = {name: getattr(analysis, name) for name in memory.FIGURES}
    except jax.errors.JaxRuntimeError as error:
        refusal = str(error)
        if memory.exhausted(refusal) is None:
            raise
    made = Kept(text, figures, refusal, time.perf_counter() - begin)
    kept.write(path, made)
    return made


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Kernels would carry the lines of the source that they were called from: a line more, and they would be others."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def versions() -> dict[str, str]:
    """Of what compiles."""
    found = {"jax": jax.__version__}
    for name in ("jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def prepare(experiment: Experiment, target: Target) -> Program:
    """The program that would run, traced by nobody yet."""
    train = experiment.train
    if train.parallel == "pmap":
        experiment = experiment.replace(train=train.replace(parallel="sharded"))
    vocabulary = experiment.tokenizer.build().vocabulary
    return assemble(experiment, vocabulary, target.devices(), memory=int(target.usable))


def abstract_batch(experiment: Experiment, runs: Parallel) -> Batch:
    """Shapes and places of a batch as the loader would give it."""
    B, T = experiment.data.batch_size, experiment.data.layout.seq_len

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        rows = ("batch", *[None] * (len(shape) - 1))
        place = runs.layout.place(rows, shape) if runs.layout else SingleDeviceSharding(runs.devices[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    arrays = {name: array((B, T)) for name in POSITION_ARRAYS.values()}
    arrays |= {"modality_BT": array((B, T), jnp.int8), "weight_BT": array((B, T), jnp.float32)}
    media = {
        name: Media(array((B, adapter.items, *adapter.features.shape), jnp.float32), array((B, adapter.items)))
        for name, adapter in experiment.model.adapters.items()
    }
    return Batch(**arrays | {"coordinate_BT3": array((B, T, 3))}, media=media)
