"""Targets of a plan: "v5e:16x16", "h100:8" or "cpu:8", and the compiler that is used for each."""

import dataclasses
import math
import re

import jax

from polygpt import topology
from polygpt.errors import UserError
from polygpt.scale.plan import chips
from polygpt.scale.plan.chips import Chip

_GPU = (
    "no GPU compiler is available here, so the sharded program is compiled for as many CPU devices, with XLA attention "
    "instead of cuDNN's. Bytes of parameters, optimizer state and batch are exact; FLOPs come from the formula. "
    "Temporaries and collectives are estimates from the CPU program, which sends bfloat16 as float32; for times see "
    "below. Usable memory is the {reserved:.0%} of a GPU that JAX reserves: set XLA_PYTHON_CLIENT_MEM_FRACTION, such "
    "as 0.92, for both this command and training to use more"
)
_CPU = (
    "the peak speed of this CPU is not published, so there are no times; memory, FLOPs and collectives are those of "
    "the compiled program"
)
"""Notes on targets without a local compiler or published speed."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One or more TPU slices, or a number of GPUs or CPU devices.

    Attributes:
        name: the name given to `--on`.
        chip: specifications of the chip.
        torus: chips along each axis of a slice; for GPUs and CPUs, the number of devices.
        slices: number of slices, connected by the data-centre network.
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
        """Description of what is estimated because the target's own compiler is missing; empty for a TPU."""
        if self.platform == "gpu":
            return _GPU.format(reserved=self.chip.usable / self.chip.memory)
        return _CPU if self.platform == "cpu" else ""

    @property
    def has_stand_in(self) -> bool:
        """Whether another platform's compiler is used: the CPU's for a GPU."""
        return self.platform == "gpu"

    @property
    def traced(self) -> str:
        """The platform whose kernels the program is traced with: the CPU's for a GPU."""
        return "tpu" if self.platform == "tpu" else "cpu"

    @property
    def count(self) -> int:
        """Number of JAX devices."""
        return math.prod(self.torus) * self.slices * self.chip.devices

    @property
    def usable(self) -> float:
        """Bytes of memory available to a program per device."""
        usable = self.chip.each(self.chip.usable)
        return usable / self.count if self.platform == "cpu" else usable

    @property
    def peak(self) -> float | None:
        """Peak FLOP/s per device; None if not published."""
        return self.chip.each(self.chip.flops)

    def prepare(self) -> None:
        """Configures JAX to create enough CPU devices for a GPU or CPU target; call it before JAX initialises.

        Raises:
            UserError: JAX is already initialised with fewer devices.
        """
        if self.platform == "tpu":
            return
        try:
            jax.config.update("jax_num_cpu_devices", self.count)
        except RuntimeError:
            pass  # JAX is already initialised
        if len(jax.devices("cpu")) < self.count:
            raise UserError(
                f"--on {self.name}: this process has {len(jax.devices('cpu'))} CPU devices: a process gets them at its "
                f"start, so plan in a new one, or set JAX_NUM_CPU_DEVICES={self.count}"
            )

    def devices(self) -> list[jax.Device]:
        """The devices for the mesh. They may not be attached: programs can be compiled for them but not run."""
        if self.platform == "tpu":
            return topology.devices(self.name, self.slices)
        return jax.devices("cpu")[: self.count]

    def wraps_around(self, axis: int) -> bool:
        """Whether this torus axis has wraparound links (v5p page: in slices of 4x4x4 and larger; 2D: axes of 16)."""
        ring = self.chip.ring
        sizes = self.torus if len(self.torus) == 3 else self.torus[axis : axis + 1]
        return all(size >= ring and size % ring == 0 for size in sizes)


def target(name: str, slices: int = 1) -> Target:
    """The target with that name.

    Raises:
        UserError: the chip, slice or number of devices is not valid.
    """
    kind, colon, size = name.partition(":")
    if not colon and (kind in topology.SHAPES or topology.explain_name(name)):
        topology.require(name)  # its error lists the valid slices
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
    """Location of a TPU device: (coordinates of the chip, index of the device on the chip, index of the slice)."""
    return tuple(device.coords), device.core_on_chip, getattr(device, "slice_index", None) or 0
