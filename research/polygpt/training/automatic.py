"""`train.parallel="auto"`: a sane way to use the devices there are, and the reason for it in words.

Rows are split over as many devices as divide them, and positions (sequence) or heads (tensor) over the rest. Parameters
and optimizer are split too (fsdp) where whole copies would take too much of a device's memory. What is exact is for
`polygpt plan --search`, which compiles; this is arithmetic.
"""

import dataclasses
import os
from math import prod
from typing import Any

import jax

from polygpt.errors import UserError
from polygpt.runtime import processes
from polygpt.sharding import MeshSpec
from polygpt.training.parallel import Mode

WHOLE = 0.4
"""Share of a device's memory that a whole copy of the state and the gradient may take; activations need the rest."""
SPLIT = 0.6
"""Share that the split state may take before the reason says that it hardly fits."""
ROW = 128
"""Positions that a part of a row should have at least, where rows themselves are split."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        mode: of `parallel.build`.
        mesh: the mesh, if the mode is "sharded".
        reason: why, in one line.
    """

    mode: Mode
    mesh: MeshSpec
    reason: str


def choose(
    *, state: int, gradient: int, memory: int, devices: int, rows: int, accumulate: int, length: int, heads: int
) -> Choice:
    """A way to run.

    Args:
        state: bytes of parameters, optimizer and moving average.
        gradient: bytes of a gradient.
        memory: bytes that one device has.
        devices: how many there are.
        rows: of the global batch.
        accumulate: microbatches.
        length: positions of a row.
        heads: what a split over tensor has to divide.

    Raises:
        UserError: if neither rows, positions nor heads can be divided so that every device has its own to do.
    """
    if devices == 1:
        return Choice("single", MeshSpec(), "there is one device")
    divisors = (n for n in range(1, devices + 1) if devices % n == 0 and rows % (n * accumulate) == 0)
    parts = max(divisors, default=1)
    rest, need = devices // parts, state + gradient
    why = f"{rows} rows over {parts} devices"
    sequence = tensor = 1
    if rest > 1 and length % rest == 0 and length >= ROW * rest:
        sequence, why = rest, f"{why}, the positions of each over {rest}"
    elif heads % rest:
        raise UserError(
            f"train.parallel auto: data.rows {rows} can be split over {parts} of {devices} devices, and neither rows "
            f"of {length} positions nor {heads} heads over {rest} more: make data.rows a multiple of "
            f"{devices * accumulate}, or set train.mesh"
        )
    elif rest > 1:
        tensor, why = rest, f"{why}, heads and hidden widths over {rest}"
    takes = f"state and gradient take {_size(need)} and a device has {_size(memory)}"
    sizes = {"tensor": tensor, "sequence": sequence}
    if need / tensor <= WHOLE * memory:
        held = "every device holds a whole copy" if tensor == 1 else "what is not split is on every device"
        return Choice("sharded", MeshSpec(data=parts, **sizes), f"{why}; {held}: {takes}")
    reason = f"{why}; parameters and optimizer are split: {takes}"
    if need / (parts * tensor) > SPLIT * memory:
        reason += f", which is too much for {devices} devices: take more, or look with polygpt plan --search"
    return Choice("sharded", MeshSpec(data=1, fsdp=parts, **sizes), reason)


def memory_of_all() -> int:
    """Bytes that every device of every process has at least; all processes have to ask."""
    here = min(map(_memory_of, jax.local_devices()))
    return min(map(int, processes.gather("memory of devices", str(here))))


def bytes_of(shapes: Any) -> int:
    """Bytes of all leaves of a tree of shapes."""
    return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _memory_of(device: jax.Device) -> int:
    """Bytes that a device has; of a CPU device its share of the machine's memory."""
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
