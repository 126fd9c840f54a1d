"""How long exchanges between devices take at least, on the links that their groups have.

Formulas (Thakur et al. 2005, "Optimization of collective communication operations in MPICH"; Chan et al. 2007;
Patarasuk and Yuan 2009): of an array of V bytes over n devices an all-gather or reduce-scatter moves V (n - 1)/n
through every device, an all-reduce twice that, over the links of the group's devices. On a torus a group that covers a
whole closed axis has two links per device there. In a line the device at the end has one, which bounds a gather; what
an all-reduce sends spreads over all 2 (n - 1) links of the line. A group over several axes has the links of them all;
one of every s-th chip shares them with s - 1 others, and its ring is closed where the axis is and the chips are evenly
spaced.

Two times follow. One after another: the sum of what each exchange takes by itself. The busiest links: exchanges along
different axes, and permutes in opposite directions, run at once, so a step is only bound by the links that have most
to carry. What an exchange has to carry can be spread over the links of its own axes, but no further: the exchanges that
have only some directions of the torus to go along take at least their bytes over the bandwidth of those directions.
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
"""Bandwidth between the two devices of a tpu7x, as a multiple of a link's."""
SINGLE = ("collective-permute", "collective-broadcast")
"""Kinds in which a device sends the whole array."""

Direction = tuple[int | str, int]
"""An axis of the torus and a way along it, 1 or -1; of what is no torus ("chip", 1) or ("switch", 1)."""
Loads = dict[frozenset[Direction], float]
"""Bytes that each chip has to send, times the links they pass, by the directions that they may go."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step's exchanges.

    Attributes:
        busiest: on the links of a slice or node that have most to carry: all exchanges at once.
        in_turn: on those links, one exchange after another.
        network: between slices or nodes, where all share what a device has.
    """

    busiest: float
    in_turn: float
    network: float


@dataclasses.dataclass(frozen=True)
class Line:
    """The part of a torus' axis that a group covers.

    Attributes:
        axis: which.
        length: chips of the group along it.
        closed: whether they form a ring.
        step: distance of neighbours.
        hops: links between two of them, on average over all pairs, each with itself too.
    """

    axis: int
    length: int
    closed: bool
    step: int
    hops: float


def total(found: Sequence[Collective], target: Target, devices: Sequence[jax.Device]) -> Times:
    """Of a step.

    Args:
        found: the collectives.
        target: whose links.
        devices: in the order of the mesh.
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
    """(on the links of a slice or node, on the network between them): of one execution by itself, without latencies."""
    if target.platform == "cpu":
        return 0.0, 0.0
    unit = _unit(one.kind, one.group, one.pairs, target, tuple(devices))
    return one.payload * unit.inside, one.payload * unit.across


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What one byte of an exchange's payload takes: everything here grows with the payload in proportion.

    Attributes:
        inside, across: seconds on the links of a slice or node, and on the network between them.
        loads: of what stays within slices or nodes.
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
    inside = max(_busiest(loads, target), _narrowest(own, target, devices))
    if kind in SINGLE:
        return _Unit(inside, 1 / network if across > 1 else 0.0, loads)
    # Within each slice first, then every device with its like in other slices, of its share of the array.
    share = 1 / (1 if kind == "all-to-all" else len(own.group)) * (across - 1) / across
    return _Unit(inside, share * (2 if kind == "all-reduce" else 1) / network, loads)


def _inside(one: Collective, target: Target, devices: Sequence[jax.Device]) -> tuple[Collective, int]:
    """What of an exchange stays within slices or nodes, and how many of them its group, or some pair, is in."""

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


def _narrowest(one: Collective, target: Target, devices: Sequence[jax.Device]) -> float:
    """What some single link needs, where that is more than the average of all: at an end or in the middle of a line."""
    lines = [] if target.platform == "gpu" else _lines(one.group, target, devices)
    if not lines or one.kind == "all-reduce":
        return 0.0
    if one.kind == "all-to-all":
        # What has to cross the middle of an axis, on the one link there of each line, or two of each ring.
        cuts = [line.length // 2 * -(-line.length // 2) / line.length * line.step / (1 + line.closed) for line in lines]
        return one.payload * target.chip.devices * max(cuts) / target.chip.link
    if one.kind == "collective-permute":
        return one.payload / target.chip.link
    bandwidth = sum((2 if line.closed else 1) / line.step for line in lines) * target.chip.link
    return _received(one, target, devices) / bandwidth


def _received(one: Collective, target: Target, devices: Sequence[jax.Device]) -> float:
    """Bytes of a gather that a chip receives: what both its devices want comes over its links once."""
    number = len({place(devices[member])[0] for member in one.group})
    groups = target.chip.devices * number / len(one.group)  # that a chip is in
    return groups * one.payload * (number - 1) / number


def _loads(one: Collective, target: Target, devices: Sequence[jax.Device]) -> Loads:
    """Of one execution of what stays within slices or nodes."""
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
    """Each pair takes the shortest way along each axis; the mean over all chips counts."""
    each = one.payload * target.chip.devices / len(devices)
    loads: Loads = {}
    for sender, taker in one.pairs:
        start, end = place(devices[sender])[0], place(devices[taker])[0]
        ways = {("chip", (1,)): 1} if start == end else {}
        for axis, size in enumerate(target.torus):
            far = end[axis] - start[axis]
            if target.closed(axis):
                far = (far + size // 2) % size - size // 2
            half = target.closed(axis) and 2 * abs(far) == size  # as far one way as the other
            if far:
                ways[axis, (1, -1) if half else (1,) if far > 0 else (-1,)] = abs(far)
        for (axis, either), hops in ways.items():
            directions = frozenset((axis, way) for way in either)
            loads[directions] = loads.get(directions, 0.0) + each * hops
    return loads


def _busiest(loads: Loads, target: Target) -> float:
    """Seconds of the directions that have most to carry for their bandwidth: the greatest of all sets of them."""
    chosen = {frozenset()}
    for ways in loads:  # any other set has more bandwidth than one of these and as much to carry
        chosen |= {some | ways for some in chosen}
    chosen.remove(frozenset())
    return max((_within(some, loads) / sum(_bandwidth(way, target) for way in some) for some in chosen), default=0.0)


def _within(some: frozenset[Direction], loads: Loads) -> float:
    """Bytes that have nowhere else to go."""
    return sum(load for ways, load in loads.items() if ways <= some)


@functools.cache
def _bandwidth(way: Direction, target: Target) -> float:
    """Bytes/s of a chip that way, on average over the axis: the ends of a line have no link on."""
    axis, _ = way
    if axis == "switch":
        return target.chip.link
    if axis == "chip":
        return CHIPLETS * target.chip.link
    return target.chip.link * (1 if target.closed(axis) else (target.torus[axis] - 1) / target.torus[axis])


def _lines(group: Sequence[int], target: Target, devices: Sequence[jax.Device]) -> list[Line]:
    """By axis of the torus along which the group extends."""
    places = [place(devices[number])[0] for number in group]
    found = []
    for axis, size in enumerate(target.torus):
        values = sorted({coordinates[axis] for coordinates in places})
        if len(values) < 2:
            continue
        steps = {b - a for a, b in itertools.pairwise(values)}
        closed = target.closed(axis) and len(steps) == 1 and len(values) * min(steps) == size
        far = [abs(a - b) for a in values for b in values]
        hops = sum(min(d, size - d) if target.closed(axis) else d for d in far) / len(values) ** 2
        found.append(Line(axis, len(values), closed, min(steps), hops))
    return found


def describe(target: Target) -> str:
    """The links of a target in words."""
    chip = target.chip
    if target.platform == "gpu":
        per = chips.SWITCHED[chip.name]
        return f"NVLink, {chip.link / 1e9:g} GB/s one way, within {per}; {chip.network / 1e9:g} GB/s between"
    if target.platform == "cpu":
        return "memory"
    rings = [f"{size}{' (ring)' if target.closed(axis) else ' (line)'}" for axis, size in enumerate(target.torus)]
    text = f"{chip.shape} {' x '.join(rings)}, {chip.link / 1e9:g} GB/s per link one way"
    between = f"; {target.slices} slices, {chip.network / 1e9:g} GB/s per chip between slices"
    return text + (between if target.slices > 1 else "")
