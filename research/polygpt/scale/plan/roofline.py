"""The least time that a step can take: compute, memory and interconnect, each at its published peak.

Of a target whose compiler is not here there is no roofline: what another program reads and writes, and how it is fused,
says nothing of it. `StandIn` has what is left.
"""

import dataclasses

CEILING = """\
The ceiling is an upper bound for this compiled program on full rows, one example each, at the published peaks, if
compute, memory and interconnect overlapped fully: a step takes at least as long as the longest of the three. (Packed
rows attend to less, and kernels leave out what is not seen.) It is no forecast. Matrix products do not reach the peak,
exchanges wait for what they send and are not all hidden, and input, host and stragglers take their time: measured MFU
lies below it. A plan whose ceiling is low cannot be fast; one whose ceiling is high may still be slow. "Nothing hidden"
adds the three up, each at its peak."""
"""What a ceiling is and is not, to be printed beside it."""


STAND_IN = """\
There is no roofline and no ceiling of the MFU: both need the program of a GPU's compiler, and this is a CPU's. FLOPs
are those of the formula, at the peak of the datasheet, which matrix products do not reach. Exchanges are as the
partitioner, which both compilers share, puts them into the CPU's program, on the datasheet's links: an estimate, in
which bfloat16 that a CPU sends as float32 counts twice, and without what a GPU's compiler merges, splits or hides."""
"""What can be said of a GPU's time and what not, to be printed beside it."""


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What is known of the time of a step whose program is compiled for other devices; seconds, on one device.

    Attributes:
        useful: useful FLOPs, by the formula, at the peak of bfloat16.
        again: FLOPs recomputed by remat, by the formula.
        links: exchanges within a node, all at once, as the other program has them.
        in_turn: the same one after another.
        network: exchanges between nodes.
    """

    useful: float
    again: float
    links: float
    in_turn: float
    network: float

    def to_json(self) -> dict:
        """As JSON data."""
        return dataclasses.asdict(self) | {"note": STAND_IN}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step, on one device.

    Attributes:
        compute: matrix products and attention kernels at the peak of bfloat16, those of a pipeline's bubble among them.
        memory: bytes that the program reads and writes, at the memory's bandwidth.
        links: exchanges within a slice or node, all at once: what the busiest links need.
        in_turn: the same exchanges one after another.
        network: exchanges between slices or nodes.
        useful: useful FLOPs of one device.
        executed: FLOPs that it executes.
        peak: its FLOP/s.
    """

    compute: float
    memory: float
    links: float
    in_turn: float
    network: float
    useful: float
    executed: float
    peak: float

    @property
    def bounds(self) -> dict[str, float]:
        """The three bounds, the network as a fourth where there is one."""
        bounds = {"compute": self.compute, "HBM": self.memory, "interconnect": self.links}
        return bounds | ({"network": self.network} if self.network else {})

    @property
    def bound(self) -> str:
        """The one that rules."""
        return max(self.bounds, key=self.bounds.get)

    @property
    def step(self) -> float:
        """Seconds of a step if all overlap."""
        return max(self.bounds.values())

    @property
    def serial(self) -> float:
        """Seconds of a step if nothing overlaps."""
        return self.compute + self.memory + self.in_turn + self.network

    @property
    def ceiling(self) -> float:
        """MFU if all overlap: useful FLOPs over what the peak would do in that time."""
        return self.useful / (self.step * self.peak)

    @property
    def floor(self) -> float:
        """MFU at the published peaks if nothing overlaps; no lower bound of a measured one."""
        return self.useful / (self.serial * self.peak)

    def to_json(self) -> dict:
        """As JSON data."""
        derived = {"bound": self.bound, "step": self.step, "serial": self.serial}
        derived |= {"mfu_ceiling": self.ceiling, "mfu_nothing_hidden": self.floor, "ceiling": CEILING}
        return dataclasses.asdict(self) | derived
