"""Roofline of a step: lower bounds from compute, memory and interconnect, each at its published peak.

Without the target's own compiler there is no roofline, because memory traffic and fusions of another compiler's program
differ. `StandIn` has the estimates that remain.
"""

import dataclasses

CEILING = """\
The ceiling is an upper bound on the MFU of this compiled program, on full rows of one example each and at published
peak rates: if compute, memory traffic and communication overlap fully, a step still takes as long as the longest of
the three. (Packed rows need less attention, and kernels skip masked blocks.) It is not a forecast. Matrix products do
not reach the peak, collectives wait for their inputs and do not overlap fully, and input, host and stragglers take
time, so the measured MFU is lower. A plan with a low ceiling cannot be fast; one with a high ceiling may still be slow.
"No overlap" adds up the three times, each at its peak rate."""
"""What the MFU ceiling means; printed with it."""


STAND_IN = """\
There is no roofline and no ceiling of the MFU: both need a program of the GPU compiler, and this one is for CPU
devices. FLOPs are those of the formula at the datasheet's peak, which matrix products do not reach. Collectives are
those that the SPMD partitioner, which both compilers share, put into the CPU program, timed on the datasheet's links.
This is an estimate: bfloat16 arrays, which a CPU sends as float32, count twice, and it ignores that the GPU compiler
merges, splits and overlaps collectives."""
"""What the time estimates for a GPU mean; printed with them."""


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Time estimates for a step whose program was compiled for another platform; seconds per step on one device.

    Attributes:
        useful: useful FLOPs by the formula, at the bfloat16 peak.
        again: FLOPs recomputed by remat by the formula, at the bfloat16 peak.
        links: collectives of the compiled program within a node, if all overlap.
        in_turn: the same collectives, one after another.
        network: collectives between nodes.
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
    """Seconds per step on one device.

    Attributes:
        compute: matrix products and attention kernels, including a pipeline's bubble, at the bfloat16 peak.
        memory: bytes read and written, at the memory bandwidth.
        links: collectives within a slice or node, if all overlap: time of the busiest links.
        in_turn: the same collectives, one after another.
        network: collectives between slices or nodes.
        useful: useful FLOPs per device.
        executed: executed FLOPs per device.
        peak: peak FLOP/s per device.
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
        """Seconds by bound: compute, HBM, interconnect and, if it is used, the network."""
        bounds = {"compute": self.compute, "HBM": self.memory, "interconnect": self.links}
        return bounds | ({"network": self.network} if self.network else {})

    @property
    def bound(self) -> str:
        """Name of the largest bound."""
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
        """MFU if all overlap: useful FLOPs divided by peak FLOPs in that time."""
        return self.useful / (self.step * self.peak)

    @property
    def floor(self) -> float:
        """MFU at the published peaks if nothing overlaps. It is not a lower bound on the measured MFU."""
        return self.useful / (self.serial * self.peak)

    def to_json(self) -> dict:
        """As JSON data."""
        derived = {"bound": self.bound, "step": self.step, "serial": self.serial}
        derived |= {"mfu_ceiling": self.ceiling, "mfu_nothing_hidden": self.floor, "ceiling": CEILING}
        return dataclasses.asdict(self) | derived
