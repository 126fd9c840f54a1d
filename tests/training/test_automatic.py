"""`train.parallel="auto"`: arithmetic on state size and device memory; what a run leaves unused is named."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from polygpt.errors import UserError
from polygpt.training import automatic
from polygpt.training.automatic import choose

GB = 10**9
MODEL = {"batch_size": 64, "accumulate": 1, "lengths": (2048,), "heads": 32}


@pytest.mark.parametrize(
    "state, devices, changes, expected",
    [
        (1 * GB, 1, {}, ("single", {})),
        (1 * GB, 8, {}, ("sharded", {"data": 8})),  # whole copies fit
        (12 * GB, 8, {}, ("sharded", {"fsdp": 8})),  # they would fill a device
        (12 * GB, 8, {"batch_size": 4}, ("sharded", {"fsdp": 4, "sequence": 2})),  # fewer rows than devices
        (1 * GB, 8, {"batch_size": 4, "lengths": (128,)}, ("sharded", {"data": 4, "tensor": 2})),  # short
        (200 * GB, 16, {"batch_size": 16}, ("sharded", {"fsdp": 16})),  # split as far as it goes
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
                **MODEL | {"batch_size": rows, "accumulate": accumulate, "heads": 24},
            )
            sizes = choice.mesh.sizes(12)
            parts = sizes["data"] * sizes["fsdp"]
            assert rows % parts == 0 and (rows // parts) % accumulate == 0 or parts == 1


def test_positions_are_split_only_where_the_rows_of_held_out_tasks_divide_too():
    def chosen(*lengths):
        given = MODEL | {"batch_size": 4, "lengths": lengths}
        return choose(state=GB, gradient=GB, memory=16 * GB, devices=8, **given).mesh

    assert (chosen(2048, 512).sequence, chosen(2048, 511).sequence, chosen(2048, 511).tensor) == (2, 1, 2)


def test_work_that_does_not_divide_over_all_devices_is_refused():
    with pytest.raises(UserError, match="data.batch_size 4, .* over 3 devices: make data.batch_size a multiple of 3"):
        choose(
            state=GB, gradient=GB, memory=16 * GB, devices=3, **MODEL | {"batch_size": 4, "heads": 2, "lengths": (64,)}
        )


@pytest.mark.parametrize(
    ("devices", "rows", "used", "mode"), [(3, 4, 2, "sharded"), (7, 5, 5, "sharded"), (3, 1, 1, "single")]
)
def test_devices_may_be_left_idle_where_that_is_allowed(devices, rows, used, mode):
    given = MODEL | {"batch_size": rows, "heads": 1, "lengths": (64,)}
    choice = choose(state=GB, gradient=GB, memory=16 * GB, devices=devices, spare=True, **given)
    assert (choice.mode, choice.devices, choice.mesh.data) == (mode, used, max(used, 1) if mode == "sharded" else -1)
    assert f"{devices - used} of {devices}" in choice.reason and f"multiple of {devices}" in choice.reason


def test_one_device_needs_no_reason():
    assert choose(state=GB, gradient=GB, memory=16 * GB, devices=1, **MODEL).reason is None


@pytest.mark.parametrize(
    ("parallel", "devices", "platform", "dtype", "options"),
    [
        ("single", 8, "cpu", "float32", ["1 of 8 devices: --train.parallel auto"]),
        ("auto", 8, "cpu", "float32", []),
        ("single", 1, "cpu", "float32", []),
        ("auto", 1, "gpu", "float32", ["float32 on a GPU: --model.dtype bfloat16"]),
        ("single", 4, "tpu", "float32", ["1 of 4 devices", "float32 on a TPU: --model.dtype bfloat16"]),
        ("auto", 1, "gpu", "bfloat16", []),
    ],
)
def test_what_a_run_leaves_unused_is_named_with_its_option(monkeypatch, parallel, devices, platform, dtype, options):
    monkeypatch.setattr(automatic.jax, "device_count", lambda: devices)
    lines = automatic.unused(parallel, SimpleNamespace(platform=platform), dtype)
    assert len(lines) == len(options) and all(option in line for option, line in zip(options, lines, strict=True))


def test_what_does_not_fit_is_said():
    fits, not_fits = (choose(state=n * GB, gradient=n * GB, memory=16 * GB, devices=8, **MODEL) for n in (20, 200))
    assert "too much" not in fits.reason and "too much for 8 devices: use more" in not_fits.reason


def test_a_cpu_device_has_its_share_of_the_machines_memory_and_others_what_they_say():
    installed = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    share = int(installed[1]) * 1024 / jax.local_device_count()
    assert automatic.memory_of_all() == pytest.approx(share, rel=1e-3)
    silent = SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert automatic._memory_of(silent) == pytest.approx(share, rel=1e-3)
    assert automatic._memory_of(SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 5})) == 5
