"""Experts on eight fake devices: the numbers of one device, and the messages that were meant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from many_devices import VARIABLES

SCRIPT = Path(__file__).with_name("experts_on_eight_devices.py")
EXPERTS_AND_WIDTHS = [{8, 16, 48}, {2, 16, 48}, {4, 16, 48}, {8, 16, 24}, {4, 16, 24}]
"""The axes of the experts' kernels, whole, or as a device has them."""


def run(*meshes: str) -> dict:
    environment = os.environ | VARIABLES
    done = subprocess.run(
        [sys.executable, SCRIPT, *meshes], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(runs: dict) -> None:
    """Losses and gradients of one device, the balance of routers included."""
    for form, found in runs.items():
        for name, mesh in found["meshes"].items():
            print(f"{form:10} {name:30} largest relative error of a gradient {mesh['error']:.1e}")
            np.testing.assert_allclose(mesh["loss"], found["loss"], rtol=1e-5)
            assert mesh["error"] < 1e-5
            sizes = dict(re.findall(r"(\w+) (\d)", name))
            assert mesh["held"] == 1 / np.prod(
                [int(n) for axis, n in sizes.items() if axis != "data" and axis != "sequence"]
            )


@pytest.fixture(scope="module")
def runs():
    return run("expert 4, data 2")


def test_losses_and_gradients_equal_those_of_one_device(runs):
    check(runs)


def test_positions_travel_and_experts_stay(runs):
    """Two exchanges forward and two backward; no device ever holds the experts of another."""
    buffers = runs["capacity"]["meshes"]["expert 4, data 2"]["collectives"]
    assert len(buffers["all-to-all"]) == 4 and not buffers["all-gather"]
    gathered = runs["dropless"]["meshes"]["expert 4, data 2"]["collectives"]
    assert not gathered["all-to-all"] and gathered["all-gather"] and gathered["reduce-scatter"]
    for shapes in gathered["all-gather"]:
        axes = {int(n) for n in re.search(r"\[([\d,]+)\]", shapes)[1].split(",")}
        assert axes not in EXPERTS_AND_WIDTHS, shapes


@pytest.mark.slow
def test_other_axes_of_the_mesh_beside_that_of_experts():
    check(run("expert 2, tensor 2, data 2", "expert 2, fsdp 2, sequence 2", "stage 2, expert 2, tensor 2"))
