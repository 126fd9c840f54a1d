"""`train.parallel="auto"`: chooses how to use the available devices, explains why, and names unused resources.

The batch is split over as many devices as divide it; positions (sequence) or heads (tensor) over the rest. Parameters
and optimizer state are sharded as well (fsdp) if a full copy would take too much of a device's memory. This is an
estimate; `polygpt plan --search` compiles and is exact.
"""

import dataclasses
import os
from collections.abc import Sequence
from math import prod
from typing import Any

import jax

from polygpt.errors import UserError
from polygpt.runtime import processes
from polygpt.sharding import MeshSpec
from polygpt.spec import counted
from polygpt.training.parallel import Mode

WHOLE = 0.4
"""Fraction of a device's memory that a full copy of state and gradient may take; activations need the rest."""
SPLIT = 0.6
"""Fraction that the sharded state may take before the reason warns that it barely fits."""
ROW = 128
"""Minimum positions per device when sequences are split."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """What was chosen.

    Attributes:
        mode: for `parallel.build`.
        mesh: the mesh, if the mode is "sharded".
        reason: why, in one line; None for one device, where there is nothing to choose.
        devices: number of devices used.
    """

    mode: Mode
    mesh: MeshSpec
    reason: str | None
    devices: int = 1


def choose(
    *,
    state: int,
    gradient: int,
    memory: int,
    devices: int,
    batch_size: int,
    accumulate: int,
    lengths: Sequence[int],
    heads: int,
    spare: bool = False,
) -> Placement:
    """Chooses mode and mesh.

    Args:
        state: bytes of parameters, optimizer state and moving average.
        gradient: bytes of a gradient.
        memory: bytes per device.
        devices: number of devices.
        batch_size: global batch size.
        accumulate: number of microbatches.
        lengths: positions per row: for training, then for held-out tasks with their own length.
        heads: number of heads, which tensor parallelism must divide.
        spare: whether devices may stay idle if batch, positions and heads do not divide over all of them.

    Raises:
        UserError: if the work cannot be divided over all devices and none may stay idle.
    """
    if devices == 1:
        return Placement("single", MeshSpec(), None)
    need = state + gradient
    for used in range(devices, 0 if spare else devices - 1, -1):
        if (split := _split(used, batch_size, accumulate, lengths, heads)) is not None:
            break
    else:
        raise UserError(
            f"train.parallel auto: data.batch_size {batch_size}, rows of {lengths[0]} positions "
            f"and {heads} heads do not divide "
            f"over {devices} devices: make data.batch_size a multiple of {devices * accumulate}, or set train.mesh"
        )
    sizes, parts, why = split
    idle = devices - used
    if idle:
        verb = "is" if idle == 1 else "are"
        why += (
            f" ({idle} of {devices} {verb} idle: make data.batch_size a multiple of {devices * accumulate} to use all)"
        )
    if used == 1:
        return Placement("single", MeshSpec(), why)
    takes = f"state and gradient take {_size(need)} and a device has {_size(memory)}"
    tensor = sizes["tensor"]
    if need / tensor <= WHOLE * memory:
        held = "every device holds a full copy" if tensor == 1 else "the rest is replicated"
        return Placement("sharded", MeshSpec(data=parts, **sizes), f"{why}; {held}: {takes}", used)
    reason = f"{why}; parameters and optimizer state are sharded: {takes}"
    if need / (parts * tensor) > SPLIT * memory:
        reason += f", too much for {counted(used, 'device')}: use more, or try polygpt plan --search"
    return Placement("sharded", MeshSpec(data=1, fsdp=parts, **sizes), reason, used)


def _split(
    devices: int, batch_size: int, accumulate: int, lengths: Sequence[int], heads: int
) -> tuple[dict[str, int], int, str] | None:
    """Sizes of the tensor and sequence axes, number of batch shards, and a description; None if devices would idle."""
    parts = max(
        (n for n in range(1, devices + 1) if devices % n == 0 and batch_size % (n * accumulate) == 0), default=1
    )
    rest, why = devices // parts, f"{batch_size} rows over {counted(parts, 'device')}"
    if rest == 1:
        return {"tensor": 1, "sequence": 1}, parts, why
    if all(length % rest == 0 for length in lengths) and lengths[0] >= ROW * rest:
        return {"tensor": 1, "sequence": rest}, parts, f"{why}, the positions of each over {rest}"
    if heads % rest == 0:
        return {"tensor": rest, "sequence": 1}, parts, f"{why}, heads and hidden widths over {rest}"
    return None


def unused(parallel: str, device: jax.Device, dtype: str) -> tuple[str, ...]:
    """What a run leaves unused on this machine: one line each, with the option that would use it.

    Args:
        parallel: the experiment's `train.parallel`.
        device: one of the devices used.
        dtype: the model's compute dtype.
    """
    lines, available = [], jax.device_count()
    if parallel == "single" and available > 1:
        lines.append(f"uses 1 of {available} devices: --train.parallel auto uses all")
    if dtype == "float32" and device.platform in ("gpu", "cuda", "rocm", "tpu"):
        kind = "TPU" if device.platform == "tpu" else "GPU"
        lines.append(f"computes in float32 on a {kind}: --model.dtype bfloat16 is faster and takes less memory")
    return tuple(lines)


def memory_of_all() -> int:
    """Smallest memory of any device of any process, in bytes. Collective: all processes must call it."""
    here = min(map(_memory_of, jax.local_devices()))
    return min(map(int, processes.gather("memory of devices", str(here))))


def bytes_of(shapes: Any) -> int:
    """Total bytes of a tree of shapes."""
    return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _memory_of(device: jax.Device) -> int:
    """Bytes of a device's memory; for a CPU device, its share of the machine's."""
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
