"""Times of exchanges, by hand, on tori, chiplets, switches and networks."""

import dataclasses

import pytest

from polygpt.errors import UserError
from polygpt.scale.plan.collectives import Collective
from polygpt.scale.plan.links import seconds, total
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


def permute(*pairs: tuple[int, int]) -> Collective:
    """One of a gigabyte."""
    return dataclasses.replace(exchange("collective-permute", pairs[0]), pairs=pairs)


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
    assert every_second == pytest.approx(7 / 8 * GB / (2 * 50 * GB / 2))  # a ring too, shared by two groups
    every_fourth = seconds(exchange("all-reduce", range(0, 16, 4)), on, devices)[0]
    assert every_fourth == pytest.approx(2 * 3 / 4 * GB / (2 * 50 * GB / 4))
    uneven = seconds(exchange("all-gather", (0, 4, 8)), on, devices)[0]
    assert uneven == pytest.approx(2 / 3 * GB / (50 * GB / 4))
    half = seconds(exchange("all-gather", range(128)), on, devices)[0]  # a ring of 16 by a line of 8
    assert half == pytest.approx(127 / 128 * GB / (3 * 50 * GB))


def test_small_slices_are_lines_and_cubes_are_rings():
    line = seconds(exchange("all-gather", range(4)), target("v5e:4x4"), grid(4, 4))[0]
    ring = seconds(exchange("all-gather", range(4)), target("v5p:4x4x4"), grid(4, 4, 4))[0]
    assert line == pytest.approx(3 / 4 * GB / (50 * GB)) and ring == pytest.approx(3 / 4 * GB / (2 * 100 * GB))
    every_second = seconds(exchange("all-gather", (0, 2)), target("v5p:4x4x4"), grid(4, 4, 4))[0]
    assert every_second == pytest.approx(1 / 2 * GB / (100 * GB))


def test_an_all_reduce_in_a_line_sends_sums_one_way_and_results_the_other():
    # Of 4 in a line: towards one end every link carries the gigabyte once, and back once.
    line = seconds(exchange("all-reduce", range(4)), target("v5e:4x4"), grid(4, 4))[0]
    assert line == pytest.approx(GB / (50 * GB))
    square = seconds(exchange("all-reduce", range(16)), target("v5e:4x4"), grid(4, 4))[0]
    assert square == pytest.approx(2 * 15 * GB / (48 * 50 * GB))  # 24 links, both ways


def test_all_to_all_crosses_the_middle():
    # 16 devices of 1/16 GB each: half of all bytes cross each of the two cuts of a ring, in both directions.
    crossing = 16 * GB / 2 / 2
    found = seconds(exchange("all-to-all", range(16)), target("v5e:16x16"), grid(16, 16))[0]
    assert found == pytest.approx(crossing / 2 / (50 * GB))
    # Of all 256 both axes are crossed at once: 8 of 16 GB in a row, half of them to the other side.
    both = seconds(exchange("all-to-all", range(256)), target("v5e:16x16"), grid(16, 16))[0]
    assert both == pytest.approx(found)
    line = seconds(exchange("all-to-all", range(4)), target("v5e:4x4"), grid(4, 4))[0]
    assert line == pytest.approx(2 * GB / 2 / (50 * GB))  # 2 devices send half of theirs over the link in the middle


def test_the_halves_of_a_chip_share_its_links():
    on, devices = target("tpu7x:4x4x4"), grid(4, 4, 4, cores=2)
    pair = seconds(exchange("all-gather", (0, 1)), on, devices)[0]
    assert pair == pytest.approx(1 / 2 * GB / (6 * 100 * GB))
    whole = seconds(exchange("all-gather", range(8)), on, devices)[0]
    assert whole == pytest.approx(3 / 4 * GB / (2 * 100 * GB))  # a chip lacks three quarters, whatever its halves have
    halves = seconds(exchange("all-gather", range(0, 8, 2)), on, devices)[0]
    assert halves == pytest.approx(3 / 4 * GB / (2 * 50 * GB))


def test_between_slices_every_chip_sends_its_share_over_the_network():
    devices = [dataclasses.replace(device, slice_index=i) for i in range(2) for device in grid(16, 16)]
    inside, across = seconds(exchange("all-reduce", range(512)), target("v5e:16x16", 2), devices)
    assert inside == pytest.approx(2 * 255 / 256 * GB / (4 * 50 * GB))
    assert across == pytest.approx(2 * 1 / 2 * GB / 256 / (25 * GB / 8))


def test_of_a_group_in_any_order_those_of_one_slice_talk_over_its_links():
    devices = [dataclasses.replace(device, slice_index=i) for i in range(2) for device in grid(16, 16)]
    mixed = [number + 256 * part for number in range(16) for part in range(2)]  # slices in turn
    inside, across = seconds(exchange("all-gather", mixed), target("v5e:16x16", 2), devices)
    assert inside == pytest.approx(15 / 16 * GB / (2 * 50 * GB))
    assert across == pytest.approx(1 / 2 * GB / 16 / (25 * GB / 8))


def test_a_permute_is_known_by_all_its_pairs():
    devices = [dataclasses.replace(device, slice_index=i) for i in range(2) for device in grid(16, 16)]
    on = target("v5e:16x16", 2)
    assert seconds(permute((0, 1), (1, 0)), on, devices) == (pytest.approx(1 / 50), 0.0)
    assert seconds(permute((0, 1), (1, 256)), on, devices) == (pytest.approx(1 / 50), pytest.approx(8 / 25))
    assert seconds(permute((0, 256), (256, 0)), on, devices) == (0.0, pytest.approx(8 / 25))


def rows(way: int) -> Collective:
    """A permute by one place along every row of 16."""
    return permute(*((16 * y + x, 16 * y + (x + way) % 16) for y in range(16) for x in range(16)))


def test_a_step_is_bound_by_the_links_that_have_most_to_carry():
    on, devices = target("v5e:16x16"), grid(16, 16)

    def both(*some):
        times = total(some, on, devices)
        return times.busiest, times.in_turn

    row, column = exchange("all-gather", range(16)), exchange("all-gather", range(0, 256, 16))
    each = 15 / 16 / (2 * 50)
    assert both(row, column) == pytest.approx((each, 2 * each))  # along different axes
    assert both(row, row) == pytest.approx((2 * each, 2 * each))
    assert both(rows(1), rows(-1)) == pytest.approx((1 / 50, 2 / 50))  # in opposite directions
    assert both(rows(1), rows(1)) == pytest.approx((2 / 50, 2 / 50))
    # Gathers fill the direction that the permute leaves: 1 GB and 2 x 15/16 GB on two links.
    assert both(rows(1), row, row) == pytest.approx(((1 + 30 / 16) / (2 * 50), 1 / 50 + 2 * each))
    assert both(rows(1), row) == pytest.approx((1 / 50, 1 / 50 + each))  # a permute has but one
    # One over both axes goes along columns while the row is busy: 15/16 GB and 255/256 GB on four links.
    whole = exchange("all-gather", range(256))
    assert both(row, whole) == pytest.approx(((15 / 16 + 255 / 256) / 200, each + 255 / 256 / 200))
    assert both(row, row, row, whole) == pytest.approx((3 * each, 3 * each + 255 / 256 / 200))


def test_a_gather_and_a_scatter_in_a_line_fill_each_others_idle_links():
    on, devices = target("v5e:4x4"), grid(4, 4)
    gather, scatter = exchange("all-gather", range(4)), exchange("reduce-scatter", range(4))
    times = total([gather, scatter], on, devices)
    # A link that hands on 3 shards of the gather's hands on 1 of the scatter's: 4 shards of 1/4 GB.
    assert times.busiest == pytest.approx(1 / 50) and times.in_turn == pytest.approx(2 * 3 / 4 / 50)


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
