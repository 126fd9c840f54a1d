"""What a program is planned for: "v5e:16x16", "h100:8", "cpu:8", and which compiler stands in for it here."""

import dataclasses
import math
import re

import jax

from polygpt import topology
from polygpt.errors import UserError
from polygpt.scale.plan import chips
from polygpt.scale.plan.chips import Chip

_GPU = (
    "no GPU compiler here: the sharded program is compiled for as many CPU devices, with plain XLA attention in place "
    "of cuDNN's. Bytes of parameters, optimizer and batch are exact, and FLOPs are by formula; temporaries and "
    "collectives are estimates, those of that program (a CPU sends bfloat16 as float32); of the time see below. Usable "
    "memory is the {reserved:.0%} of a GPU that JAX reserves: set XLA_PYTHON_CLIENT_MEM_FRACTION, such as 0.92, for "
    "both this command and training to use more"
)
_CPU = (
    "the speed of this CPU is not published: memory, FLOPs and collectives are those of the compiled program; there "
    "are no times"
)
"""What a reader has to know of targets whose compiler is not here, or whose speed nobody knows."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice of TPUs, several of them, or a number of GPUs or CPU devices.

    Attributes:
        name: as `--on` has it.
        chip: its figures.
        torus: chips along each axis of a slice; of GPUs and CPUs their number.
        slices: slices, joined by the data-centre network.
    """

    name: str
    chip: Chip
    torus: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        """'tpu', 'gpu' or 'cpu'."""
        return {"switch": "gpu", "memory": "cpu"}.get(self.chip.shape, "tpu")

    @property
    def estimated(self) -> str:
        """What is estimated because the target's own compiler is not here, in words; empty for a TPU."""
        if self.platform == "gpu":
            return _GPU.format(reserved=self.chip.usable / self.chip.memory)
        return _CPU if self.platform == "cpu" else ""

    @property
    def stood_in(self) -> bool:
        """Whether another platform's compiler stands in for its own: a CPU's for a GPU's."""
        return self.platform == "gpu"

    @property
    def traced(self) -> str:
        """The platform whose kernels the program is traced with: a CPU's stand in for a GPU's."""
        return "tpu" if self.platform == "tpu" else "cpu"

    @property
    def count(self) -> int:
        """JAX devices."""
        return math.prod(self.torus) * self.slices * self.chip.devices

    @property
    def usable(self) -> float:
        """Bytes of memory that a program may take of one device."""
        usable = self.chip.each(self.chip.usable)
        return usable / self.count if self.platform == "cpu" else usable

    @property
    def peak(self) -> float | None:
        """FLOP/s of one device."""
        return self.chip.each(self.chip.flops)

    def prepare(self) -> None:
        """Lets JAX make up the CPU devices that stand in for GPUs; before its first use.

        Raises:
            UserError: JAX has begun with fewer.
        """
        if self.platform == "tpu":
            return
        try:
            jax.config.update("jax_num_cpu_devices", self.count)
        except RuntimeError:
            pass  # it has begun
        if len(jax.devices("cpu")) < self.count:
            raise UserError(
                f"--on {self.name}: this process has {len(jax.devices('cpu'))} CPU devices: a process gets them at its "
                f"start, so plan in a new one, or set JAX_NUM_CPU_DEVICES={self.count}"
            )

    def devices(self) -> list[jax.Device]:
        """The devices to make a mesh of; what is compiled for them cannot always be run."""
        if self.platform == "tpu":
            return topology.devices(self.name, self.slices)
        return jax.devices("cpu")[: self.count]

    def closed(self, axis: int) -> bool:
        """Whether the ends of this axis of the torus are joined (v5p page: all of 4x4x4 and larger; 16 where flat)."""
        ring = self.chip.ring
        sizes = self.torus if len(self.torus) == 3 else self.torus[axis : axis + 1]
        return all(size >= ring and size % ring == 0 for size in sizes)


def target(name: str, slices: int = 1) -> Target:
    """The target of that name.

    Raises:
        UserError: there is no such chip, slice or number.
    """
    kind, colon, size = name.partition(":")
    if not colon and (kind in topology.SHAPES or topology.translated(name)):
        topology.require(name)  # which says what there is
    if not colon:
        raise UserError(f"--on {name}: write CHIP:SIZE, such as v5e:16x16, v5p:4x4x4, h100:8 or cpu:8")
    chip = chips.chip(kind)
    if slices < 1:
        raise UserError(f"--slices {slices}: at least 1")
    if chip.shape in ("switch", "memory"):
        if slices > 1:
            raise UserError(f"--slices {slices}: slices are of TPUs; give the number of all devices: {kind}:{size}")
        if not re.fullmatch(r"[1-9]\d*", size):
            raise UserError(f"--on {name}: {size!r} is not a number of devices; write {kind}:8")
        return Target(name, chip, (int(size),))
    topology.require(name)
    return Target(name, chip, tuple(int(n) for n in size.split("x")), slices)


def place(device: jax.Device) -> tuple[tuple[int, ...], int, int]:
    """Where a device of a TPU slice is: its chip's coordinates, which of the chip's devices it is, and the slice."""
    return tuple(device.coords), device.core_on_chip, getattr(device, "slice_index", None) or 0
