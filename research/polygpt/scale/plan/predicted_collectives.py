"""Analytic estimate of a step's collectives."""

import dataclasses
import functools
import math

import numpy as np

from polygpt.blocks.pipeline import Schedule
from polygpt.scale.plan.collectives import Collective
from polygpt.scale.plan.facts import DECODER, Facts, MeshFacts
from polygpt.sharding import AXES, MeshLayout
from polygpt.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class BlockWork:
    """Work of the decoder blocks on a device, per microbatch of gradient accumulation.

    Attributes:
        blocks: decoder blocks on the device.
        positions: positions that pass through a block at once: of all rows, or of one pipeline microbatch.
        executions: number of block executions.
    """

    blocks: float
    positions: float
    executions: float


def block_work(positions: float, depth: int, layout: MeshLayout, schedule: Schedule) -> BlockWork:
    """The work for `positions` per device outside the pipeline. Inside it, the devices of all stages share rows."""
    P, R, M = schedule.stages, schedule.repeats, schedule.microbatches
    shared = math.prod(layout.mesh.shape[axis] for axis in set(layout.names("batch")) & set(layout.names("stages")))
    return BlockWork(depth / P, positions * shared / M, schedule.iterations * depth / (P * R))


def predicted_collectives(
    experiment: Experiment, known: Facts, here: MeshFacts, positions: float, work: BlockWork, compute: int
) -> list[Collective]:
    """The collectives that a sharding needs at least: all-gathers and reduce-scatters of parameters and gradients,
    all-reduces of activations and gradients, and transfers between pipeline stages.

    Args:
        experiment: the experiment, with the configuration to estimate.
        known: facts of the experiment.
        here: facts of the mesh.
        positions: positions per device that are processed at once outside the pipeline.
        work: the work of the device's decoder blocks.
        compute: bytes per element of the compute dtype.
    """
    layout, schedule = here.layout, here.schedule
    model, parts, sizes = experiment.model, experiment.optim.accumulate, dict(layout.mesh.shape)
    decoder, turns, shape = model.decoder, work.executions, layout.mesh.devices.shape
    again = decoder.remat == "full"
    found = []

    def add(kind: str, axes: tuple[str, ...], payload: float, times: float) -> None:
        if payload and (group := _group(shape, axes)):
            pairs = _neighbours(shape, axes[0]) if kind == "collective-permute" else ()
            found.append(Collective(kind, axes, group, payload, round(times), "", "", True, pairs))

    sharded = tuple(axis for axis in layout.spec.rules["width"] if sizes[axis] > 1)
    block = here.blocks[DECODER].matrices
    rest = here.gathered - block * work.blocks  # towers, embedding, head
    summed = 4 if layout.spec.reduce_dtype == "float32" else compute
    for elements, uses in ((block, turns), (rest, 1)):
        add("all-gather", sharded, elements * compute, 2 * uses * parts)
        add("reduce-scatter", sharded, elements * summed, uses * parts)
    copies = tuple(axis for axis in ("data", "expert", "sequence") if sizes[axis] > 1 and axis not in sharded)
    add("all-reduce", copies, here.sharded * 4, parts)
    stream = work.positions * decoder.width * compute
    add("all-reduce", ("tensor",) if sizes["tensor"] > 1 else (), stream, turns * (4 + 2 * again) * parts)
    if sizes["sequence"] > 1:
        keys = sum(m.shape[-1] for m in known.matrices if m.path.startswith(DECODER) and "kv_heads" in m.names)
        keys /= max(len(decoder.period()), 1) * layout.size("kv_heads")
        gathered = work.positions * sizes["sequence"] * keys * compute
        add("all-gather", ("sequence",), gathered, turns * (2 + again) * parts)
    if sizes["expert"] > 1:
        period = decoder.period()
        copies = sum(getattr(layer.mlp, "top_k", 0) for layer in period) / len(period) or 1
        add("all-to-all", ("expert",), stream * copies, turns * (4 + 2 * again) * parts)
    if schedule.stages > 1:
        P, stages = schedule.stages, layout.names("stages")
        add("collective-permute", stages, stream, 3 * schedule.iterations * parts)  # one forward, two backward
        # Rows of one stage's devices go to those of all stages, and back; the backward pass does the reverse.
        add("all-gather", stages, positions * P * decoder.width * compute, 2 * parts)
        add("all-reduce", stages, positions * P * decoder.width * compute, parts)
        add("all-reduce", stages, rest * here.sharded / here.gathered * 4, parts)
        if schedule.repeats > 1:
            add("all-to-all", stages, block * work.blocks * compute, 2 * parts)
    return found


@functools.cache
def _group(shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[int, ...]:
    """Mesh indices of the first device and of those that differ from it along `axes` only."""
    if not axes:
        return ()
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return tuple(numbers[tuple(slice(None) if axis in axes else 0 for axis in AXES)].ravel().tolist())


@functools.cache
def _neighbours(shape: tuple[int, ...], axis: str) -> tuple[tuple[int, int], ...]:
    """(device, next device along `axis`) for every mesh index; the last is followed by the first."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    following = np.roll(numbers, -1, axis=AXES.index(axis))
    return tuple(zip(numbers.ravel().tolist(), following.ravel().tolist(), strict=True))
