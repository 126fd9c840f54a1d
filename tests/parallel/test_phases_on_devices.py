"""Runs in phases on several devices: the losses of one device, and bit-exact when resumed."""

from pathlib import Path

import numpy as np
import pytest
from test_modes import run

SCRIPT = Path(__file__).with_name("phases_on_devices.py")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(SCRIPT, "single", tmp_path_factory.mktemp("single"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "sharded", "stages"])
def test_phases_are_those_of_one_device(tmp_path, single, mode):
    found = run(SCRIPT, mode, tmp_path)
    assert found["same"] and len(found["losses"]) == 8
    np.testing.assert_allclose(found["losses"], single["losses"], rtol=1e-5)
