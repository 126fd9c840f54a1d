"""Four processes train, one is killed; the others name it and end; two go on, and no example is lost or repeated."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polygpt.runtime.checkpoint import records

EXPERIMENT = Path(__file__).with_name("four_processes.py")
BOUND = 12  # seconds; less than half of train.processes.heartbeat_timeout: the launcher reports the death
PATIENCE = 600


def launch(count, workdir):
    command = [sys.executable, "-m", "polygpt.cli.main", "launch", "local", "-n", str(count), "--grace", "60", "--"]
    command += ["train", str(EXPERIMENT), "--workdir", str(workdir), "--no-report"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def running(pid):
    """Whether the process has not ended; one that nobody has asked for its code yet has."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def steps_done(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def log(workdir, rank):
    return (workdir / "logs" / f"p{rank}.log").read_text()


def examples(workdir):
    """(step, data shard) to the examples that it was trained on: task, position in its stream, number."""
    found = {}
    for path in sorted(workdir.glob("examples-*.jsonl")):
        data_shard = int(re.fullmatch(r"examples-(\d+)", path.stem)[1])
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            assert (entry["step"], data_shard) not in found
            found[entry["step"], data_shard] = [tuple(example) for example in entry["examples"]]
    return found


@pytest.mark.slow
def test_one_of_four_is_killed_and_two_go_on_without_losing_an_example(tmp_path):
    workdir = tmp_path / "run"
    four = launch(4, workdir)
    # A checkpoint is behind it and some steps that none holds.
    wait_for(lambda: steps_done(workdir) >= 15 and records(workdir / "checkpoints"), four)
    pid, *others = (int(re.search(r"pid (\d+):", log(workdir, rank))[1]) for rank in (2, 0, 1, 3))
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while any(map(running, others)):
        time.sleep(0.05)
    took = time.monotonic() - killed
    said, _ = four.communicate(timeout=PATIENCE)
    assert four.returncode == 1 and took < BOUND, (took, said)
    assert "process 2 was killed by SIGKILL" in said
    for rank in (0, 1, 3):
        assert re.search(rf"process 2 \(host \S+, pid {pid}\) was killed by SIGKILL", log(workdir, rank))
    print(f"the others had ended {took:.1f} s after process 2 was killed (bound: {BOUND} s)")

    kept = max(record.step for record in records(workdir / "checkpoints"))
    two = launch(2, workdir)
    said, _ = two.communicate(timeout=PATIENCE)
    assert two.returncode == 0, said
    assert f"resuming at step {kept}" in said

    trained = examples(workdir)
    steps = {step for step, _ in trained}
    assert steps == set(range(1, 71))
    assert {data_shard for step, data_shard in trained if step <= kept} == {0, 1, 2, 3}
    assert {data_shard for step, data_shard in trained if step > kept} == {0, 1}
    by_task = collections.defaultdict(list)
    for batch in trained.values():
        for task, position, number in batch:
            by_task[task].append((position, number))
    for task, seen in by_task.items():
        positions = sorted(position for position, _ in seen)
        assert len(positions) == len(set(positions)), f"{task}: an example was repeated"
        count = max(number for _, number in seen) + 1
        whole = positions[-1] // count - 1  # epochs that must be complete: the last ones are being read ahead
        assert whole >= 1, "the run is too short to prove anything"
        for epoch in range(whole):
            numbers = sorted(number for position, number in seen if position // count == epoch)
            assert numbers == list(range(count)), f"{task}: epoch {epoch} lost an example"
