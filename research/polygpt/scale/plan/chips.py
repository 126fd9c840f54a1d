"""Published specifications of accelerators: the only table that time estimates use.

All values are per chip or per GPU: bytes, bytes per second, and FLOP/s of dense bfloat16 products. A JAX device is one
chip, except on tpu7x, where each of the two chiplets of a chip is a device.

Sources, by their names in the table:
    v4 page, v5e page, v5p page, v6e page, tpu7x page: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, the tables
        "key specifications". They give the interconnect bandwidth summed over all links and both directions (v5e
        400 GB/s, v5p 1,200, v6e 800, tpu7x 1,200); the one-way bandwidth of a link is that sum over twice the number of
        links. Older versions of the v5e page give 819 GB/s of HBM bandwidth, newer ones 800 GiB/s. The bandwidth
        between the two chiplets of a tpu7x is six times that of a link ("dual-chiplet architecture").
    TPU v4 paper: Jouppi et al. (2304.01433), table 4: 6 links of 50 GB/s.
    compiler: the "available HBM" that libtpu 0.0.42 reports when a program for that slice does not fit; the rest of the
        capacity is reserved for the system. For v5p, published as 95 GB, it reports 95.74 GiB, so the published value
        is not used as a limit.
    datasheets: NVIDIA A100, H100 and H200 Tensor Core GPU datasheets (SXM; dense, without sparsity; half of the
        bidirectional NVLink bandwidth), and DGX A100, H100 and H200 for the network: one adapter of 200 or 400 Gb/s per
        GPU.
"""

import dataclasses
import math
import os
from typing import Literal

from polygpt.errors import UserError

GIB = 2**30
RESERVED = 0.75
"""Share of a GPU's memory that JAX reserves by default (docs.jax.dev/en/latest/gpu_memory_allocation.html)."""
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables that override `RESERVED`; the second is the older name."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as in `--on`.
        title: full name.
        flops: peak dense bfloat16 FLOP/s; None if not published.
        memory: published capacity, bytes.
        usable: memory available to a program, bytes.
        bandwidth: memory bandwidth, bytes/s.
        link: one-way bandwidth of an interconnect link, bytes/s; for a GPU, of all its links together.
        links: number of links.
        network: one-way bandwidth of the data-centre network, bytes/s.
        shape: interconnect topology; "memory" for the CPU devices of one machine.
        ring: smallest size at which an axis of the torus has wraparound links in every slice. Smaller axes, and those
            whose size is not a multiple of it, have none.
        devices: JAX devices per chip.
        source: source of the values.
    """

    name: str
    title: str
    flops: float | None
    memory: float
    usable: float
    bandwidth: float | None
    link: float | None
    links: int
    network: float | None
    shape: Literal["2D torus", "3D torus", "switch", "memory"]
    ring: int = 0
    devices: int = 1
    source: str = ""

    def each(self, figure: float | None) -> float | None:
        """A figure of the chip divided by its number of JAX devices."""
        return None if figure is None else figure / self.devices


def _tpu(name, title, teraflops, gib, usable, gigabytes, link, links, network, ring, source, devices=1) -> Chip:
    shape = "2D torus" if links == 4 else "3D torus"
    bandwidth, link, network = gigabytes * 1e9, link * 1e9, network * 1e9 / 8
    return Chip(
        name, title, teraflops * 1e12, gib * GIB, usable * GIB, bandwidth, link, links, network, shape, ring, devices,
        f"{source}; usable memory: compiler",
    )  # fmt: skip


def _gpu(name, title, teraflops, gigabytes, terabytes, nvlink, network, source) -> Chip:
    memory = gigabytes * 1e9
    return Chip(
        name, title, teraflops * 1e12, memory, RESERVED * memory, terabytes * 1e12, nvlink * 1e9, 1, network * 1e9 / 8,
        "switch", source=source,
    )  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 275, 32, 30.75, 1200, 50, 6, 50, 4, "v4 page; links: TPU v4 paper; network: as v5p"),
        _tpu("v5e", "TPU v5e", 197, 16, 15.75, 819, 50, 4, 25, 16, "v5e page; network: its 2 x 100 Gb/s for 8 chips"),
        _tpu("v5p", "TPU v5p", 459, 95, 95.74, 2765, 100, 6, 50, 4, "v5p page"),
        _tpu("v6e", "TPU v6e (Trillium)", 918, 32, 31.25, 1638, 100, 4, 100, 16, "v6e page, tpu7x page"),
        _tpu("tpu7x", "TPU7x (Ironwood)", 2307, 192, 189.5, 7380, 100, 6, 100, 4, "tpu7x page", devices=2),
        _gpu("a100", "NVIDIA A100 SXM 80 GB", 312, 80, 2.039, 300, 200, "A100 and DGX A100 datasheets"),
        _gpu("h100", "NVIDIA H100 SXM", 989.4, 80, 3.35, 450, 400, "H100 and DGX H100 datasheets"),
        _gpu("h200", "NVIDIA H200 SXM", 989.4, 141, 4.8, 450, 400, "H200 and DGX H200 datasheets"),
    )
}
"""The chips, by name."""

SWITCHED = {"a100": 8, "h100": 8, "h200": 8}
"""GPUs per NVLink domain; beyond that they communicate over the network."""


def cpu() -> Chip:
    """This machine, shared by virtual JAX devices. Its speed is unknown."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip("cpu", "this machine's CPU", None, memory, memory, None, None, 0, None, "memory", source="this machine")


def chip(name: str) -> Chip:
    """The chip with that name. Raises UserError, which lists the known chips, for an unknown name."""
    if name == "cpu":
        return cpu()
    if name not in CHIPS:
        raise UserError(f"--on {name}: unknown chip: choose from {', '.join(CHIPS)} and cpu")
    found = CHIPS[name]
    return dataclasses.replace(found, usable=reserved() * found.memory) if found.shape == "switch" else found


def reserved() -> float:
    """Share of a GPU's memory that JAX reserves for programs: set by an environment variable, else `RESERVED`.

    Raises:
        UserError: the environment's value is not a number above 0 and up to 1.
    """
    variable, text = next(((name, os.environ[name]) for name in FRACTIONS if os.environ.get(name)), ("", ""))
    if not variable:
        return RESERVED
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"{variable} is {text!r}: it must be a number above 0 and at most 1, such as 0.92")
    return share
