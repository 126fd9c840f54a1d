"""Lower bounds on the time of collectives, from the bandwidth of the links that their device groups use.

Formulas (Thakur et al. 2005, "Optimization of collective communication operations in MPICH"; Chan et al. 2007;
Patarasuk and Yuan 2009): for an array of V bytes over n devices, each device sends V (n - 1)/n bytes in an all-gather
or reduce-scatter and twice that in an all-reduce, over the links of the group's devices. On a torus, a group that spans
a whole axis with wraparound has two links per device along it. On a line the device at the end has only one link, which
bounds an all-gather; the traffic of an all-reduce spreads over all 2 (n - 1) one-way links of the line. A group that
spans several axes uses the links of all of them. A group of every s-th chip shares the links with s - 1 other groups;
it forms a ring if the axis has wraparound and the chips are evenly spaced.

There are two estimates. In turn: the sum over collectives of the time that each takes alone. Busiest links: collectives
along different axes, and permutes in opposite directions, overlap, so only the most loaded links bound the step. A
collective can spread its traffic only over the links of its own axes. So, for each set of directions of the torus, the
collectives confined to it take at least their bytes over the total bandwidth of the set.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax

from polygpt.scale.plan import chips
from polygpt.scale.plan.collectives import NETWORK, Collective
from polygpt.scale.plan.target import Target, place

CHIPLETS = 6
"""Bandwidth between the two devices of a tpu7x chip, as a multiple of a link's bandwidth."""
SINGLE = ("collective-permute", "collective-broadcast")
"""Kinds in which each device sends its whole array."""

Direction = tuple[int | str, int]
"""A torus axis and a direction along it, 1 or -1; ("chip", 1) within a chip and ("switch", 1) for GPUs."""
Loads = dict[frozenset[Direction], float]
"""Bytes per chip times links traversed, by the set of directions that the traffic may take."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step's collectives.

    Attributes:
        busiest: time of the busiest links within a slice or node, if all collectives overlap.
        in_turn: time within a slice or node, if collectives run one after another.
        network: time on the network between slices or nodes, which all collectives share.
    """

    busiest: float
    in_turn: float
    network: float


@dataclasses.dataclass(frozen=True)
class Line:
    """The part of a torus axis that a group spans.

    Attributes:
        axis: index of the axis.
        length: chips of the group along the axis.
        ring: whether they form a ring.
        step: distance between neighbours in the group.
        hops: mean number of links between two of them, over all ordered pairs including a chip with itself.
    """

    axis: int
    length: int
    ring: bool
    step: int
    hops: float


def total(found: Sequence[Collective], target: Target, devices: Sequence[jax.Device]) -> Times:
    """Times of all collectives of a step.

    Args:
        found: the collectives.
        target: the target, which has the links.
        devices: devices in mesh order.
    """
    devices = tuple(devices)
    carried: Loads = {}
    in_turn = network = 0.0
    for one in found if target.platform != "cpu" else ():
        unit, bytes_ = _unit(one.kind, one.group, one.pairs, target, devices), one.times * one.payload
        in_turn += bytes_ * unit.inside
        network += bytes_ * unit.across
        for ways, load in unit.loads.items():
            carried[ways] = carried.get(ways, 0.0) + bytes_ * load
    return Times(_busiest(carried, target), in_turn, network)


def seconds(one: Collective, target: Target, devices: Sequence[jax.Device]) -> tuple[float, float]:
    """(seconds on the links of a slice or node, seconds on the network) of one execution alone, without latency."""
    if target.platform == "cpu":
        return 0.0, 0.0
    unit = _unit(one.kind, one.group, one.pairs, target, tuple(devices))
    return one.payload * unit.inside, one.payload * unit.across


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Cost per byte of a collective's payload; all costs are proportional to the payload.

    Attributes:
        inside, across: seconds on the links of a slice or node, and on the network between them.
        loads: loads of the part within slices or nodes.
    """

    inside: float
    across: float
    loads: Loads


@functools.lru_cache(4096)
def _unit(kind: str, group: tuple[int, ...], pairs: tuple[tuple[int, int], ...], target: Target, devices) -> _Unit:
    network = target.chip.each(target.chip.network)
    one = Collective(kind, (), group, 1.0, 1, "", "", False, pairs)
    if kind == NETWORK:
        return _Unit(0.0, 1 / network, {})
    own, across = _inside(one, target, devices)
    loads = _loads(own, target, devices)
    inside = max(_busiest(loads, target), _bottleneck(own, target, devices))
    if kind in SINGLE:
        return _Unit(inside, 1 / network if across > 1 else 0.0, loads)
    # First within each slice, then between corresponding devices of the slices, for each device's share of the array.
    share = 1 / (1 if kind == "all-to-all" else len(own.group)) * (across - 1) / across
    return _Unit(inside, share * (2 if kind == "all-reduce" else 1) / network, loads)


def _inside(one: Collective, target: Target, devices: Sequence[jax.Device]) -> tuple[Collective, int]:
    """The part of a collective within a slice or node, and the number of slices or nodes that a group or pair spans."""

    def part(number: int) -> int:
        return number // chips.SWITCHED[target.chip.name] if target.platform == "gpu" else place(devices[number])[2]

    if one.kind == "collective-permute":
        near = tuple((a, b) for a, b in one.pairs if part(a) == part(b))
        return dataclasses.replace(one, group=near[0] if near else (), pairs=near), 2 - (near == one.pairs)
    parts = [part(number) for number in one.group]
    own = tuple(number for number, its in zip(one.group, parts, strict=True) if its == parts[0])
    across = len(set(parts))
    return dataclasses.replace(
        one, group=own, payload=one.payload / (across if one.kind == "all-to-all" else 1)
    ), across


def _bottleneck(one: Collective, target: Target, devices: Sequence[jax.Device]) -> float:
    """Seconds of the bottleneck link, at an end or in the middle of a line; 0 if the mean of all links is the bound."""
    lines = [] if target.platform == "gpu" else _lines(one.group, target, devices)
    if not lines or one.kind == "all-reduce":
        return 0.0
    if one.kind == "all-to-all":
        # The traffic across the middle of an axis, where a line has one link and a ring has two.
        cuts = [line.length // 2 * -(-line.length // 2) / line.length * line.step / (1 + line.ring) for line in lines]
        return one.payload * target.chip.devices * max(cuts) / target.chip.link
    if one.kind == "collective-permute":
        return one.payload / target.chip.link
    bandwidth = sum((2 if line.ring else 1) / line.step for line in lines) * target.chip.link
    return _received(one, target, devices) / bandwidth


def _received(one: Collective, target: Target, devices: Sequence[jax.Device]) -> float:
    """Bytes that a chip receives in an all-gather. Data that both its devices need crosses its links once."""
    number = len({place(devices[member])[0] for member in one.group})
    groups = target.chip.devices * number / len(one.group)  # per chip
    return groups * one.payload * (number - 1) / number


def _loads(one: Collective, target: Target, devices: Sequence[jax.Device]) -> Loads:
    """Loads of one execution, for the part within slices or nodes."""
    n, twice = len(one.group), 2 if one.kind == "all-reduce" else 1
    if n < 2 or one.kind == NETWORK:
        return {}
    if target.platform == "gpu":
        return {frozenset([("switch", 1)]): one.payload * (1 if one.kind in SINGLE else twice * (n - 1) / n)}
    if one.kind == "collective-permute":
        return _permuted(one, target, devices)
    lines = _lines(one.group, target, devices)
    if not lines:
        return {frozenset([("chip", 1)]): one.payload * (n - 1) / n * twice}
    if one.kind == "all-to-all":
        each = one.payload * target.chip.devices
        return {frozenset([(line.axis, 1), (line.axis, -1)]): each * line.hops for line in lines}
    ways = frozenset((line.axis, way) for line in lines for way in (1, -1))
    return {ways: _received(one, target, devices) * twice * min(line.step for line in lines)}


def _permuted(one: Collective, target: Target, devices: Sequence[jax.Device]) -> Loads:
    """Loads of a permute: each pair uses the shortest path along each axis; averaged over all chips."""
    each = one.payload * target.chip.devices / len(devices)
    loads: Loads = {}
    for sender, taker in one.pairs:
        start, end = place(devices[sender])[0], place(devices[taker])[0]
        ways = {("chip", (1,)): 1} if start == end else {}
        for axis, size in enumerate(target.torus):
            far = end[axis] - start[axis]
            if target.wraps_around(axis):
                far = (far + size // 2) % size - size // 2
            half = target.wraps_around(axis) and 2 * abs(far) == size  # both directions are equally long
            if far:
                ways[axis, (1, -1) if half else (1,) if far > 0 else (-1,)] = abs(far)
        for (axis, either), hops in ways.items():
            directions = frozenset((axis, way) for way in either)
            loads[directions] = loads.get(directions, 0.0) + each * hops
    return loads


def _busiest(loads: Loads, target: Target) -> float:
    """Seconds of the busiest set of directions: the maximum over sets of their load divided by their bandwidth."""
    chosen = {frozenset()}
    for ways in loads:  # any other set has the load of one of these and more bandwidth
        chosen |= {some | ways for some in chosen}
    chosen.remove(frozenset())
    return max((_within(some, loads) / sum(_bandwidth(way, target) for way in some) for some in chosen), default=0.0)


def _within(some: frozenset[Direction], loads: Loads) -> float:
    """Load that can only use these directions."""
    return sum(load for ways, load in loads.items() if ways <= some)


@functools.cache
def _bandwidth(way: Direction, target: Target) -> float:
    """Bytes/s per chip in a direction, averaged over the axis, because the last chip of a line has no next link."""
    axis, _ = way
    if axis == "switch":
        return target.chip.link
    if axis == "chip":
        return CHIPLETS * target.chip.link
    return target.chip.link * (1 if target.wraps_around(axis) else (target.torus[axis] - 1) / target.torus[axis])


def _lines(group: Sequence[int], target: Target, devices: Sequence[jax.Device]) -> list[Line]:
    """The lines of a group: one per torus axis that it spans."""
    places = [place(devices[number])[0] for number in group]
    found = []
    for axis, size in enumerate(target.torus):
        values = sorted({coordinates[axis] for coordinates in places})
        if len(values) < 2:
            continue
        steps = {b - a for a, b in itertools.pairwise(values)}
        closed = target.wraps_around(axis) and len(steps) == 1 and len(values) * min(steps) == size
        far = [abs(a - b) for a in values for b in values]
        hops = sum(min(d, size - d) if target.wraps_around(axis) else d for d in far) / len(values) ** 2
        found.append(Line(axis, len(values), closed, min(steps), hops))
    return found


def describe(target: Target) -> str:
    """Description of a target's links."""
    chip = target.chip
    if target.platform == "gpu":
        per = chips.SWITCHED[chip.name]
        return f"NVLink, {chip.link / 1e9:g} GB/s one way, within {per}; {chip.network / 1e9:g} GB/s between"
    if target.platform == "cpu":
        return "memory"
    rings = [f"{size}{' (ring)' if target.wraps_around(axis) else ' (line)'}" for axis, size in enumerate(target.torus)]
    text = f"{chip.shape} {' x '.join(rings)}, {chip.link / 1e9:g} GB/s per link one way"
    between = f"; {target.slices} slices, {chip.network / 1e9:g} GB/s per chip between slices"
    return text + (between if target.slices > 1 else "")
