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

from polygpt.runtime.checkpoint import records

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"
SMALL = (
    "--data.batch_size 4 "
    "--model.decoder.depth 1 --train.log_every 1 --train.evaluate_every null --train.checkpoint.every 6"
)
RUNS = {
    "tiny": (Path(__file__).with_name("tiny_experiment.py"), 90, []),
    "quickstart": (QUICKSTART, 40, SMALL.split()),  # pictures, voices, augmentation, packing
}


def start(run, workdir, cache):
    file, steps, changes = RUNS[run]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [Path(sys.executable).with_name("polygpt"), "train", file, "--workdir", workdir, "--no-report"]
    command += ["--train.steps", str(steps), *changes]
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
    place = workdir.absolute() / "checkpoints" / str(max(record.step for record in records(workdir / "checkpoints")))
    with ocp.StandardCheckpointer() as reader:
        items = [item for item in ("params", "ema", "optimizer", "counts") if (place / item).exists()]
        found = {item: reader.restore(place / item) for item in items}
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): (np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_killed_twice_and_resumed_equals_never_stopped_to_the_bit(tmp_path, run):
    cache = tmp_path / "compiled"
    finish(start(run, tmp_path / "whole", cache))  # compiles; the others load what it compiled
    total = lines(tmp_path / "whole")
    rng = random.Random(time.time_ns())
    first, second = sorted(rng.sample(range(1, total - 2), 2))

    killed = tmp_path / "killed"
    kill_at(start(run, killed, cache), killed, first, saved=False)
    kill_at(start(run, killed, cache), killed, second, saved=True)
    output = finish(start(run, killed, cache))
    print(f"killed after {first} and {second} of {total} lines")
    assert (killed / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert last_checkpoint(killed) == last_checkpoint(tmp_path / "whole")
    resumed = re.search(r"resuming at step (\d+)", output)
    assert resumed and 0 < int(resumed[1]) < RUNS[run][1], "the run did not simply begin anew"
