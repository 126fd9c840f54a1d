"""Times of exchanges, by hand, on tori, chiplets, switches and networks."""

import dataclasses

import pytest

from polygpt.errors import UserError
from polygpt.scale.plan.collectives import Collective
from polygpt.scale.plan.links import seconds
from polygpt.scale.plan.target import target

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Device:
    """What is asked of a device of a slice."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0


def exchange(kind: str, group, payload: float = GB) -> Collective:
    """One of a gigabyte."""
    return Collective(kind, (), tuple(group), payload, 1, "bf16", "", False)


def grid(x: int, y: int, z: int = 1, cores: int = 1) -> list[Device]:
    """Devices in order, z slowest."""
    return [
        Device((a, b, c), core) for c in range(z) for b in range(y) for a in range(x) for core in range(cores)
    ]  # fmt: skip


def test_a_ring_sends_both_ways_and_a_line_one():
    on, devices = target("v5e:16x16"), grid(16, 16)
    row = range(16)
    assert seconds(exchange("all-gather", row), on, devices)[0] == pytest.approx(15 / 16 * GB / (2 * 50 * GB))
    assert seconds(exchange("all-reduce", row), on, devices)[0] == pytest.approx(2 * 15 / 16 * GB / (2 * 50 * GB))
    both = seconds(exchange("reduce-scatter", range(256)), on, devices)[0]
    assert both == pytest.approx(255 / 256 * GB / (4 * 50 * GB))
    part = seconds(exchange("all-gather", range(4)), on, devices)[0]  # 4 of 16: the ends are not joined
    assert part == pytest.approx(3 / 4 * GB / (50 * GB))
    every_second = seconds(exchange("all-gather", range(0, 16, 2)), on, devices)[0]
    assert every_second == pytest.approx(7 / 8 * GB / (50 * GB / 2))


def test_small_slices_are_lines_and_cubes_are_rings():
    line = seconds(exchange("all-gather", range(4)), target("v5e:4x4"), grid(4, 4))[0]
    ring = seconds(exchange("all-gather", range(4)), target("v5p:4x4x4"), grid(4, 4, 4))[0]
    assert line == pytest.approx(3 / 4 * GB / (50 * GB)) and ring == pytest.approx(3 / 4 * GB / (2 * 100 * GB))


def test_all_to_all_crosses_the_middle():
    # 16 devices of 1/16 GB each: half of all bytes cross each of the two cuts of a ring, in both directions.
    crossing = 16 * GB / 2 / 2
    found = seconds(exchange("all-to-all", range(16)), target("v5e:16x16"), grid(16, 16))[0]
    assert found == pytest.approx(crossing / 2 / (50 * GB))


def test_the_halves_of_a_chip_share_its_links():
    on, devices = target("tpu7x:4x4x4"), grid(4, 4, 4, cores=2)
    pair = seconds(exchange("all-gather", (0, 1)), on, devices)[0]
    assert pair == pytest.approx(1 / 2 * GB / (6 * 100 * GB))
    whole = seconds(exchange("all-gather", range(8)), on, devices)[0]
    assert whole == pytest.approx(7 / 8 * GB / (2 * 100 * GB))
    halves = seconds(exchange("all-gather", range(0, 8, 2)), on, devices)[0]
    assert halves == pytest.approx(3 / 4 * GB / (2 * 50 * GB))


def test_between_slices_every_chip_sends_its_share_over_the_network():
    devices = [dataclasses.replace(device, slice_index=i) for i in range(2) for device in grid(16, 16)]
    inside, across = seconds(exchange("all-reduce", range(512)), target("v5e:16x16", 2), devices)
    assert inside == pytest.approx(2 * 255 / 256 * GB / (4 * 50 * GB))
    assert across == pytest.approx(2 * 1 / 2 * GB / 256 / (25 * GB / 8))


def test_gpus_talk_through_a_switch_and_beyond_eight_over_the_network():
    assert seconds(exchange("all-gather", range(8)), target("h100:8"), [])[0] == pytest.approx(7 / 8 * GB / (450 * GB))
    inside, across = seconds(exchange("all-reduce", range(16)), target("h100:16"), [])
    assert across == pytest.approx(2 * 1 / 2 * GB / 8 / (50 * GB)) and inside > 0


@pytest.mark.parametrize(
    "name, slices", [("v9:2x2", 1), ("v5e", 1), ("v5e:3x3", 1), ("h100:x", 1), ("cpu:0", 1), ("h100:8", 2)]
)
def test_what_cannot_be_planned_for_is_refused_in_one_line(name, slices):
    with pytest.raises(UserError) as refused:
        target(name, slices)
    assert "\n" not in str(refused.value)
