"""single = pmap = sharded, on four fake devices over five steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polygpt.errors import UserError
from polygpt.training.parallel import build

MODES = ["single/1", "pmap/1", "pmap/2", "sharded/1", "sharded/2"]


def run(*command):
    """What a script prints as JSON. It compiles with fewer optimizations, which takes half the time."""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs():
    script = Path(__file__).with_name("five_steps.py")
    return run(script)


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
    parallel = build("single", {})
    parallel.check(batch_size=8, seq_len=8, accumulate=4)
    message = r"data.batch_size is 9: it must be a multiple of 2 \(split over 1 device, 2 microbatches\)"
    with pytest.raises(UserError, match=message):
        parallel.check(batch_size=9, seq_len=8, accumulate=2)


@pytest.mark.slow
def test_interrupted_and_resumed_runs_agree_in_every_mode(tmp_path):
    script = Path(__file__).with_name("resumed_run.py")
    runs = run(script, tmp_path)
    for mode in ("single", "pmap", "sharded"):
        assert 3 <= runs[mode]["stopped"] < 6 and runs[mode]["finished"] and runs[mode]["opened"] == 6
        np.testing.assert_allclose(runs[mode]["losses"], runs["single"]["losses"], rtol=1e-6)
        np.testing.assert_allclose(runs[mode]["metric"], runs["single"]["metric"], rtol=1e-6)
