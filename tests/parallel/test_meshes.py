"""However eight devices are used, loss and gradients of the full multimodal model are those of one device."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from many_devices import VARIABLES

SCRIPT = Path(__file__).with_name("eight_devices.py")
QUICK = ["data 2, fsdp 2, tensor 2"]
SLOW = [
    ["pmap", "data 2, fsdp 2, tensor 2 (blocks)"],
    ["data 8", "fsdp 8", "tensor 4, data 2", "sequence 4 (gather), data 2", "sequence 4 (ring), data 2"],
    ["fsdp 2, sequence 2 (ring), tensor 2", "stage 4, data 2", "stage 2 (circular), data 4"],
    ["stage 2, sequence 2 (gather), data 2", "stage 2, sequence 2 (ring), data 2"],
    ["pmap (blocks)", "fsdp 2, sequence 2, tensor 2 (blocks)", "stage 2, fsdp 2, expert 2 (blocks)"],
    ["pmap (encoder)", "data 2, fsdp 2, tensor 2 (encoder)", "sequence 4 (gather), data 2 (encoder)"],
    ["sequence 4 (ring), data 2 (encoder)", "stage 2, fsdp 2, expert 2 (encoder)"],
    ["stage 2 (circular), data 4 (encoder)"],
    ["sequence 4 (gather, zigzag), data 2", "sequence 4 (ring, zigzag), data 2"],
    ["fsdp 2, sequence 2 (ring, zigzag), expert 2", "stage 2, sequence 2 (gather, zigzag), data 2"],
    ["sequence 4 (gather, zigzag), data 2 (blocks)", "sequence 4 (gather, zigzag), data 2 (encoder)"],
    ["expert 4, data 2 (dropless)", "expert 4, data 2 (capacity)", "stage 2, fsdp 2, expert 2"],
    ["data 2, fsdp 2, tensor 2 (adapters)", "stage 2, fsdp 2, expert 2 (adapters)"],
    ["sequence 4 (ring), data 2 (adapters)"],
]


def differences(names: list[str]) -> dict[str, dict]:
    """By way to run: relative differences from one device, in the loss and in the gradient of the worst parameter."""
    environment = os.environ | VARIABLES
    done = subprocess.run(
        [sys.executable, SCRIPT, *names], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    table = {}
    for name in names:
        ours, single = runs[name], runs[runs[name]["single"]]
        assert list(ours["gradient"]) == list(single["gradient"]) and single["loss"] > 1
        off = {}
        for path, leaf in single["gradient"].items():
            size, gap = np.linalg.norm(leaf), np.linalg.norm(np.subtract(ours["gradient"][path], leaf))
            assert size > 0, f"the gradient of {path} is zero: nothing is compared"
            off[path] = gap / size
        worst = max(off, key=off.get)
        table[name] = ours | {"loss_off": abs(ours["loss"] / single["loss"] - 1), "off": off[worst], "worst": worst}
    return table


def check(names: list[str]) -> None:
    table = differences(names)
    print(f"\n{'eight devices':40}{'loss':>10}{'gradient':>10}  the parameter that is worst")
    for name, row in table.items():
        print(f"{name:40}{row['loss_off']:10.1e}{row['off']:10.1e}  {row['worst']}")
    for name, row in table.items():
        assert math.isfinite(row["loss"]) and row["loss_off"] < 1e-5 and row["off"] < 1e-5, name
        assert (row["split"] > 0) == (
            not name.startswith("pmap") and name != "data 8" and not name.startswith("sequence")
        ), name
        if "tensor" in name:
            assert not row["whole_vocabulary"], f"{name}: a device holds predictions of the whole vocabulary"


def test_loss_and_gradients_equal_those_of_one_device():
    check(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("names", SLOW, ids=lambda names: names[0])
def test_loss_and_gradients_equal_those_of_one_device_on_every_mesh(names):
    check(names)


@pytest.mark.slow
def test_models_that_lie_split_score_and_answer_as_on_one_device():
    script = SCRIPT.with_name("used_on_a_mesh.py")
    environment = os.environ | VARIABLES
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for what, runs in json.loads(done.stdout).items():
        single = runs.pop("single")
        assert len(runs) == 2 and any(single["answers"])
        for mesh, used in runs.items():
            for loss in ("loss", "loss in blocks"):
                np.testing.assert_allclose(used[loss], single["loss"], rtol=1e-5, err_msg=f"{what}, {mesh}, {loss}")
            assert used["correct"] == [single["correct"][0]] * 2, (what, mesh)
            assert used["answers"] == single["answers"], (what, mesh)
            split = 8 if "data 2, fsdp 2" in mesh else 2  # rows and heads; heads, and perhaps blocks
            assert used["held"] <= 1 / split, f"{what}, {mesh}: the cache is not split as rows and heads are"
