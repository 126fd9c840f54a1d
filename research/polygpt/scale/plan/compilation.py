"""Ahead-of-time compilation of an experiment's training step for devices that need not be attached."""

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
from polygpt.data.loader import extra_shapes
from polygpt.data.packing import POSITION_ARRAYS
from polygpt.runtime.compilation import compiler_options
from polygpt.scale.plan import cache, memory
from polygpt.scale.plan.cache import Cached
from polygpt.scale.plan.memory import Exhausted, Memory
from polygpt.scale.plan.target import Target
from polygpt.sequence import Batch, Media
from polygpt.training.experiment import Experiment
from polygpt.training.parallel import Parallel
from polygpt.training.program import Program, assemble

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that affect the compiler's output."""
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
"""JAX config options that affect the compiler's output."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled step.

    Attributes:
        text: HLO text of the compiled program; None if it did not fit.
        memory: memory per device; None if the compiler ran out of memory.
        exhausted: the compiler's report in that case.
        seconds: compile time, of the original compilation if the program came from the cache.
        mesh: mesh axis sizes.
        reason: why this mesh was chosen, if `train.parallel` is "auto".
        vocabulary: vocabulary size V.
        devices: the devices in mesh order.
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
    """Compiles the step of an experiment for a target, without reading data or allocating parameters.

    A single-device experiment is compiled without splits. A pmap experiment is planned as a sharded program, because
    pmap computes the same as the data axis.

    Raises:
        UserError: the mesh does not divide batch_size, seq_len or heads evenly.
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
    """A lowered step: the program, the abstract state and batch with their shardings, and the mesh."""

    program: Program
    lowered: jax.stages.Lowered
    state: Any
    batch: Batch
    mesh: jax.sharding.Mesh


def lower(experiment: Experiment, target: Target) -> Step:
    """Traces and lowers the step of an experiment. Raises the errors of `build`."""
    program = prepare(experiment, target)
    runs = program.parallel
    state, batch = runs.abstract(program.initial), abstract_batch(experiment, runs)
    mesh = runs.layout.mesh if runs.layout else jax.sharding.Mesh(runs.devices, ("data",))
    with dispatch.compiling_for(target.traced), jax.set_mesh(mesh):  # Pallas reads the TPU generation from the mesh
        with _without_traces():
            return Step(program, program.step.lower(state, batch), state, batch, mesh)


def _compiled(step: Step, target: Target) -> Cached:
    """The compiled program, from the cache if it was compiled before."""
    where = [target.name, str(target.slices), repr([device.id for device in step.mesh.devices.flat])]
    settings = {name: os.environ.get(name) for name in FLAGS} | {name: jax.config.values[name] for name in SETTINGS}
    settings |= compiler_options(step.mesh.devices.flat[0].platform) or {}
    path = cache.place([step.lowered.as_text(), *where, json.dumps([versions(), settings], sort_keys=True)])
    if (found := cache.read(path)) is not None:
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
    made = Cached(text, figures, refusal, time.perf_counter() - begin)
    cache.write(path, made)
    return made


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Lowers without source locations: kernels would contain the caller's line numbers, which change the cache key."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def versions() -> dict[str, str]:
    """Versions of JAX and the compilers."""
    found = {"jax": jax.__version__}
    for name in ("jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def prepare(experiment: Experiment, target: Target) -> Program:
    """The program that would run, not traced yet."""
    train = experiment.train
    if train.parallel == "pmap":
        experiment = experiment.replace(train=train.replace(parallel="sharded"))
    vocabulary = experiment.tokenizer.build().vocabulary
    return assemble(experiment, vocabulary, target.devices(), memory=int(target.usable))


def abstract_batch(experiment: Experiment, runs: Parallel) -> Batch:
    """A batch of `ShapeDtypeStruct`s with the shapes and shardings of the loader's batches."""
    B, T = experiment.data.batch_size, experiment.data.layout.seq_len

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        rows = ("batch", *[None] * (len(shape) - 1))
        place = runs.layout.sharding(rows, shape) if runs.layout else SingleDeviceSharding(runs.devices[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    arrays = {name: array((B, T)) for name in POSITION_ARRAYS.values()}
    arrays |= {"modality_BT": array((B, T), jnp.int8), "weight_BT": array((B, T), jnp.float32)}
    media = {
        name: Media(array((B, adapter.items, *adapter.features.shape), jnp.float32), array((B, adapter.items)))
        for name, adapter in experiment.model.adapters.items()
    }
    extra = {name: array((B, T, *shape), dtype) for name, (shape, dtype) in extra_shapes(experiment.data).items()}
    return Batch(**arrays | {"coordinate_BT3": array((B, T, 3))}, media=media, extra=extra)
