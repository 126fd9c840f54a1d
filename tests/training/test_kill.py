"""A run that is killed at random steps and started again is, to the bit, the run that never stopped."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from polygpt.training.checkpoint import records

FILE = Path(__file__).with_name("tiny_experiment.py")
STEPS = 90
SCRIPT = """
import sys
from polygpt.spec import load_file, override
from polygpt.training.loop import train

experiment = override(load_file(sys.argv[1]).experiment(), {"train.steps": sys.argv[3]})
assert train(experiment, sys.argv[2]).finished
"""


def start(workdir, cache):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", SCRIPT, FILE, workdir, str(STEPS)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(process, workdir, count, saved):
    """SIGKILL as soon as metrics.jsonl has `count` lines and, if `saved`, there is a whole checkpoint."""
    deadline = time.monotonic() + 300
    while lines(workdir) < count or saved and not records(workdir / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def last_checkpoint(workdir):
    """Every array of the last checkpoint by item and path, as bytes."""
    place = workdir.absolute() / "checkpoints" / str(STEPS)
    with ocp.StandardCheckpointer() as reader:
        found = {item: reader.restore(place / item) for item in ("params", "ema", "optimizer", "counts")}
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): (np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for path, leaf in leaves}


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_never_stopped_to_the_bit(tmp_path):
    cache = tmp_path / "compiled"
    finish(start(tmp_path / "whole", cache))  # compiles; the others load what it compiled
    total = lines(tmp_path / "whole")
    rng = random.Random(time.time_ns())
    first, second = sorted(rng.sample(range(1, total - 2), 2))

    killed = tmp_path / "killed"
    kill_at(start(killed, cache), killed, first, saved=False)
    kill_at(start(killed, cache), killed, second, saved=True)
    output = finish(start(killed, cache))
    print(f"killed after {first} and {second} of {total} lines")
    assert (killed / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert last_checkpoint(killed) == last_checkpoint(tmp_path / "whole")
    resumed = re.search(r"goes on from step (\d+)", output)
    assert resumed and 0 < int(resumed[1]) < STEPS, "the run did not simply begin anew"
