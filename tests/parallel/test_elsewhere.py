"""A checkpoint written on some devices is read on others: another number, another mesh, another mode."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from many_devices import VARIABLES
from polygpt.runtime import manifest
from polygpt.runtime.processes import COORDINATOR, PROCESS, PROCESSES
from polygpt.runtime.stored import read_parameters

SCRIPT = Path(__file__).with_name("elsewhere.py")


def start(*arguments, script=SCRIPT, **variables):
    environment = os.environ | VARIABLES | variables
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process):
    out, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1]), error


@pytest.mark.slow
def test_states_written_on_eight_devices_are_read_on_four_and_the_other_way_round(tmp_path):
    eight, four = start(tmp_path, 8, 4), start(tmp_path, 4, 8)
    came = result(eight)[0] | result(four)[0]
    assert len(came) == 32
    for way, what in came.items():
        assert what["equal"] and what["placed"], way
        assert (what["split"] > 10) == ("-> fsdp" in way or "tensor" in way.split("->")[1]), way


@pytest.mark.slow
def test_two_processes_pass_over_what_one_of_them_finds_damaged(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {COORDINATOR: f"127.0.0.1:{probe.getsockname()[1]}", PROCESSES: "2"}
    script = SCRIPT.with_name("two_processes_save.py")
    both = [start(tmp_path / "run", script=script, **place, **{PROCESS: str(rank)}) for rank in range(2)]
    for came, said in map(result, both):
        assert (came["from"], came["equal"], came["steps"]) == (1, True, [1, 2])
        assert f"run/2: {came['harmed']} is not as it was written" in said
    assert manifest.read(tmp_path / "run" / "2").processes == 2
    assert manifest.records(tmp_path / "run")[-1].metric == 0.5
    target = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    alone = read_parameters(tmp_path / "run", 2, {"w": target}, averaged=False)
    np.testing.assert_array_equal(alone["w"], np.arange(32).reshape(8, 4) + 200)


@pytest.mark.slow
def test_a_run_that_moves_from_mesh_to_mesh_is_the_run_that_stayed(tmp_path):
    whole = result(start("train", tmp_path / "whole", 1, 0))[0]
    moved = tmp_path / "moved"
    mesh = ["train.mesh.fsdp=2", "train.mesh.tensor=2"]
    ways = [
        (8, 4, "sharded", mesh),
        (1, 8, "single", []),
        (4, 12, "pmap", []),
        (4, 0, "sharded", ["train.mesh.fsdp=4"]),
    ]
    for devices, until, mode, settings in ways:
        after = result(start("train", moved, devices, until, f"train.parallel={mode}", *settings))[0]
        assert after["step"] in ((until, until + 1) if until else (18,))
    assert len(after["losses"]) == len(whole["losses"]) == 18
    np.testing.assert_allclose(after["losses"], whole["losses"], rtol=1e-5)
    assert list(after["state"]) == list(whole["state"])
    for path, leaf in whole["state"].items():  # parameters, their average and both moments, relative to their size
        assert np.linalg.norm(leaf) > 0, path
        gap = np.linalg.norm(np.subtract(after["state"][path], leaf)) / np.linalg.norm(leaf)
        assert gap < 1e-4, (path, gap)


@pytest.mark.slow
def test_an_adapter_fits_its_base_on_a_mesh_and_on_one_device(tmp_path):
    script = SCRIPT.with_name("adapted_run.py")
    words, environment = [sys.executable, script, tmp_path], os.environ | VARIABLES
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr
