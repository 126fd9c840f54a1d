"""`train.parallel="auto"`: arithmetic on what the state takes and what a device has."""

import pytest

from polygpt.errors import UserError
from polygpt.training.automatic import choose

GB = 10**9
MODEL = {"rows": 64, "accumulate": 1, "length": 2048, "heads": 32}


@pytest.mark.parametrize(
    "state, devices, changes, expected",
    [
        (1 * GB, 1, {}, ("single", {})),
        (1 * GB, 8, {}, ("sharded", {"data": 8})),  # whole copies fit
        (12 * GB, 8, {}, ("sharded", {"fsdp": 8})),  # they would fill a device
        (12 * GB, 8, {"rows": 4}, ("sharded", {"fsdp": 4, "sequence": 2})),  # fewer rows than devices
        (1 * GB, 8, {"rows": 4, "length": 128}, ("sharded", {"data": 4, "tensor": 2})),  # rows too short to split
        (200 * GB, 16, {"rows": 16}, ("sharded", {"fsdp": 16})),  # split as far as it goes
    ],
)
def test_what_is_chosen(state, devices, changes, expected):
    choice = choose(state=state, gradient=state // 3, memory=16 * GB, devices=devices, **MODEL | changes)
    mode, sizes = expected
    found = {axis: n for axis in ("data", "fsdp", "tensor", "sequence") if (n := getattr(choice.mesh, axis)) > 1}
    assert choice.mode == mode and found == {axis: n for axis, n in sizes.items() if n > 1}
    if devices > 1:
        assert choice.mesh.sizes(devices) and "rows over" in choice.reason and "16 GB" in choice.reason


def test_rows_of_every_choice_come_out_even():
    for rows in (1, 3, 8, 12, 64):
        for accumulate in (1, 2):
            choice = choose(
                state=GB,
                gradient=GB,
                memory=16 * GB,
                devices=12,
                **MODEL | {"rows": rows, "accumulate": accumulate, "heads": 24},
            )
            sizes = choice.mesh.sizes(12)
            parts = sizes["data"] * sizes["fsdp"]
            assert rows % parts == 0 and (rows // parts) % accumulate == 0 or parts == 1


def test_devices_that_would_all_do_the_same_are_refused():
    with pytest.raises(UserError, match="data.rows 4 can be split over 1 of 3 devices.*make data.rows a multiple of 3"):
        choose(state=GB, gradient=GB, memory=16 * GB, devices=3, **MODEL | {"rows": 4, "heads": 2, "length": 64})


def test_what_does_not_fit_is_said():
    fits, not_fits = (choose(state=n * GB, gradient=n * GB, memory=16 * GB, devices=8, **MODEL) for n in (20, 200))
    assert "too much" not in fits.reason and "too much for 8 devices: take more" in not_fits.reason
