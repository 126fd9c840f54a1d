"""single = pmap = sharded, on four fake devices over five steps."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from many_devices import VARIABLES
from polygpt.errors import UserError
from polygpt.training.parallel import build, require_many

MODES = ["single/1", "pmap/2", "sharded/2"]
"""With two microbatches; with one, `test_meshes.py` compares losses and gradients, and a slow test here the rest."""


def run(*command):
    """What a script prints as JSON."""
    environment = os.environ | VARIABLES
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def five_steps(*modes):
    return run(Path(__file__).with_name("five_steps.py"), *modes)


def check_values(run, single):
    np.testing.assert_allclose(run["losses"], single["losses"], rtol=1e-6)
    for leaf, other in zip(run["params"], single["params"], strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


def check_state(run, devices):
    assert run["devices"] == devices and run["donated"] and run["copies_equal"]


def check_skipping(run):
    assert run["skipped"] == 1 and run["skip_kept_params"]


@pytest.fixture(scope="module")
def runs():
    return five_steps(*MODES)


@pytest.mark.parametrize("mode", MODES[1:])
def test_losses_and_parameters_equal_those_of_one_device(runs, mode):
    check_values(runs[mode], runs["single/1"])


@pytest.mark.parametrize("mode", MODES)
def test_the_rows_are_shared_and_the_state_is_donated_and_the_same_everywhere(runs, mode):
    check_state(runs[mode], 1 if mode.startswith("single") else 4)


@pytest.mark.parametrize("mode", MODES)
def test_one_device_with_a_bad_row_makes_all_of_them_skip(runs, mode):
    check_skipping(runs[mode])


@pytest.mark.slow
def test_all_of_this_without_microbatches():
    runs = five_steps("single/1", "pmap/1", "sharded/1")
    for mode in ("pmap/1", "sharded/1"):
        check_values(runs[mode], runs["single/1"])
        check_state(runs[mode], 4)
        check_skipping(runs[mode])


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
        assert runs[mode]["started"] == {"equal": True, "placed": True}


@pytest.mark.parametrize("mode", ["single", "pmap", "sharded"])
def test_require_many_refuses_one_device_for_several_processes(mode):
    require_many(mode, 1)
    with pytest.raises(UserError, match="there are 2 processes") if mode == "single" else contextlib.nullcontext():
        require_many(mode, 2)
