"""single = pmap = sharded, on four fake devices over five steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polygpt.errors import UserError
from polygpt.training.parallel import build

MODES = ["single/1", "pmap/1", "pmap/2", "sharded/1", "sharded/2"]


@pytest.fixture(scope="module")
def runs():
    script = Path(__file__).with_name("five_steps.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", MODES[1:])
def test_losses_and_parameters_equal_those_of_one_device(runs, mode):
    np.testing.assert_allclose(runs[mode]["losses"], runs["single/1"]["losses"], rtol=1e-6)
    for leaf, other in zip(runs[mode]["params"], runs["single/1"]["params"], strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_rows_are_shared_and_the_state_is_donated_and_the_same_everywhere(runs, mode):
    assert runs[mode]["devices"] == (1 if mode.startswith("single") else 4)
    assert runs[mode]["donated"] and runs[mode]["copies_equal"]


@pytest.mark.parametrize("mode", MODES)
def test_one_device_with_a_bad_row_makes_all_of_them_skip(runs, mode):
    assert runs[mode]["skipped"] == 1 and runs[mode]["skip_kept_params"]


def test_rows_that_cannot_be_split_are_refused():
    parallel = build("single")
    parallel.check_rows(8, 4)
    with pytest.raises(UserError, match=r"data.rows is 9: it must be a multiple of 2 \(1 devices, 2 microbatches\)"):
        parallel.check_rows(9, 2)
