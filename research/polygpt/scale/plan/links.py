"""How long an exchange between devices takes at least, on the links that its group has.

Formulas (Thakur et al. 2005, "Optimization of collective communication operations in MPICH"; Chan et al. 2007): of an
array of V bytes over n devices an all-gather or reduce-scatter moves V (n - 1)/n through every device, an all-reduce
twice that, over the bandwidth of the rings that the group's devices form. On a torus a group that covers a whole closed
axis has a ring in both directions (2 links), one that covers a line has one ring there and back (1 link), and one that
covers several axes has them all; a group of every s-th chip shares its links with s - 1 others.
"""

import math
from collections.abc import Sequence

import jax

from polygpt.scale.plan import chips
from polygpt.scale.plan.collectives import NETWORK, Collective
from polygpt.scale.plan.target import Target, place

CHIPLETS = 6
"""The two devices of a tpu7x exchange so many times the bytes of a link."""


def seconds(one: Collective, target: Target, devices: Sequence[jax.Device]) -> tuple[float, float]:
    """(on the links of a slice or node, on the network between them): of one execution, without latencies.

    Args:
        one: the collective.
        target: whose links.
        devices: in the order of the mesh.
    """
    if target.platform == "cpu":
        return 0.0, 0.0
    network = target.chip.each(target.chip.network)
    if one.kind == NETWORK:
        return 0.0, one.payload / network
    n = len(one.group)
    parts = _parts(one, target, devices)
    inside, across = n // parts, parts
    if across == 1:
        return _within(one, one.group, target, devices), 0.0
    # Within each slice first, then every device with its like in other slices, of its share of the array.
    share = one.payload / inside * (across - 1) / across * (2 if one.kind == "all-reduce" else 1)
    if one.kind in ("collective-permute", "collective-broadcast"):
        return 0.0, one.payload / network
    if one.kind == "all-to-all":
        return 0.0, one.payload * (across - 1) / across / network
    return (_within(one, one.group[:inside], target, devices) if inside > 1 else 0.0), share / network


def _parts(one: Collective, target: Target, devices: Sequence[jax.Device]) -> int:
    """The number of slices, or of GPU nodes, that a group lies in."""
    if target.platform == "gpu":
        return len({number // chips.SWITCHED[target.chip.name] for number in one.group})
    return len({place(devices[number])[2] for number in one.group})


def _within(one: Collective, group: Sequence[int], target: Target, devices: Sequence[jax.Device]) -> float:
    n = len(group)
    moved = one.payload * (n - 1) / n
    if target.platform == "gpu":
        times = {"all-reduce": 2, "collective-permute": n / (n - 1)}.get(one.kind, 1)
        return moved * times / target.chip.link
    axes, each = _axes(group, target, devices)
    link = target.chip.link * each
    if not axes:
        return moved * (2 if one.kind == "all-reduce" else 1) / (CHIPLETS * target.chip.link)
    if one.kind in ("collective-permute", "collective-broadcast"):
        return one.payload / link
    if one.kind == "all-to-all":
        # Half of what a device has crosses the middle of each axis: n/4 hops on average in a ring, n/3 in a line.
        return sum(one.payload * length * (1 / 8 if closed else 1 / 4) * step / link for length, closed, step in axes)
    bandwidth = sum((2 if closed else 1) / step for _, closed, step in axes) * link
    return moved * (2 if one.kind == "all-reduce" else 1) / bandwidth


def _axes(group: Sequence[int], target: Target, devices: Sequence[jax.Device]) -> tuple[list, float]:
    """By axis of the torus along which the group extends: (chips, whether closed to a ring, distance of neighbours).

    And the share of a chip's links that each of its devices has: where the group holds one device of a chip, the
    others are in groups that exchange as much.
    """
    places = [place(devices[number]) for number in group]
    found = []
    for axis, size in enumerate(target.torus):
        values = sorted({coordinates[axis] for coordinates, _, _ in places})
        if len(values) > 1:
            step = min(b - a for a, b in zip(values, values[1:], strict=False))
            found.append((len(values), len(values) == size and target.closed(axis), step))
    held = len(group) / max(len({coordinates for coordinates, _, _ in places}), 1)
    return found, held / target.chip.devices


def describe(target: Target) -> str:
    """The links of a target in words."""
    chip = target.chip
    if target.platform == "gpu":
        per = chips.SWITCHED[chip.name]
        return f"NVLink, {chip.link / 1e9:g} GB/s one way, within {per}; {chip.network / 1e9:g} GB/s between"
    if target.platform == "cpu":
        return "memory"
    rings = [f"{size}{' (ring)' if target.closed(axis) else ' (line)'}" for axis, size in enumerate(target.torus)]
    text = f"{chip.shape} {' x '.join(rings)}, {chip.link / 1e9:g} GB/s a link one way"
    return text + (f"; {target.slices} slices, {chip.network / 1e9:g} GB/s a chip between" if target.slices > 1 else "")


def total(found: Sequence[Collective], target: Target, devices: Sequence[jax.Device]) -> tuple[float, float]:
    """Of a step, all exchanges one after another: (links, network)."""
    both = [(one.times, seconds(one, target, devices)) for one in found]
    return math.fsum(n * s for n, (s, _) in both), math.fsum(n * s for n, (_, s) in both)
