"""Several processes as one run: what they tell each other, and how they end when one of them does."""

import collections
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import pytest
from jax._src import distributed

from polygpt.errors import SpecError, UserError
from polygpt.runtime import processes
from polygpt.scale.launch import local

SCRIPT = Path(__file__).with_name("several_processes.py")
BOUND = 12  # heartbeat_timeout there


def run(scenario, count=3, ends=None, absent=0):
    """Codes and outputs of the processes but the one that `ends`, and the seconds from its end on.

    Of `count` processes the last few may be `absent`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONUNBUFFERED": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario, str(rank), str(count), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count - absent)
    ]
    begun = None
    if ends is not None:
        for line in started[ends].stdout:
            if line == "ends\n":
                break
        begun = time.monotonic()
    try:
        outputs = [p.communicate(timeout=120)[0] for rank, p in enumerate(started) if rank != ends]
        seconds = begun and time.monotonic() - begun
    finally:
        for process in started:
            process.kill()
    return [p.returncode for rank, p in enumerate(started) if rank != ends], outputs, seconds


def test_alone_nothing_waits(monkeypatch):
    for name in (processes.COORDINATOR, processes.PROCESSES, processes.PROCESS):
        monkeypatch.delenv(name, raising=False)
    with processes.together():
        processes.barrier("b")
        processes.publish("t", "x")
        assert processes.gather("g", "mine") == ["mine"] and processes.broadcast("a", "mine") == "mine"
        assert processes.published("t") is None and processes.last_barrier() is None


@pytest.mark.parametrize(
    "place", [("host", "2", "0"), ("host:1", "two", "0"), ("host:1", "2", "2"), ("host:1", "", ""), ("", "2", "1")]
)
def test_variables_at_fault_are_named(monkeypatch, place):
    for name, value in zip((processes.COORDINATOR, processes.PROCESSES, processes.PROCESS), place, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="POLYGPT_COORDINATOR, POLYGPT_PROCESSES and POLYGPT_PROCESS are"):
        processes.initialize()


@pytest.mark.parametrize(
    "field", ["initialization_timeout", "barrier_timeout", "heartbeat_timeout", "shutdown_timeout"]
)
def test_bounds_are_checked(field):
    with pytest.raises(SpecError, match=f"{field} is 0: it must be at least"):
        processes.ProcessesSpec(**{field: 0})


def test_a_batch_script_of_slurm_is_alone_and_a_step_of_several_tasks_is_not(monkeypatch):
    for name in (processes.COORDINATOR, processes.PROCESSES, processes.PROCESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert processes._place() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert processes._place() == {"cluster_detection_method": "slurm"}


def test_within_a_step_of_slurm_a_given_place_leaves_all_gpus(monkeypatch):
    for name, value in zip(
        (processes.COORDINATOR, processes.PROCESSES, processes.PROCESS), ("a:1", "2", "1"), strict=True
    ):
        monkeypatch.setenv(name, value)
    for name in ("JOB_ID", "STEP_NODELIST", "STEP_NUM_TASKS", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    state, taken = distributed.State(), []
    monkeypatch.setattr(distributed.config, "update", lambda name, value: taken.append((name, value)))
    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_client", mock.Mock())
    monkeypatch.setattr(distributed.State, "initialize_preemption_sync_manager", mock.Mock())
    state.initialize(**processes._place())
    assert state.process_id == 1 and not taken


def test_texts_reach_all_and_all_end_together():
    codes, outputs, _ = run("talk")
    assert codes == [0, 0, 0], outputs
    for output in outputs:
        assert "gathered ['0', '1', '2'] ['again 0', 'again 1', 'again 2']\n" in output
        assert "agreed of 0 of 0, again\n" in output and "told 3\n" in output
        assert re.search(r"last passed barrier 'a/b c', use 1, at \d\d:\d\d:\d\d\n", output)
        for name in ("start", "names", "word", "a/b c", "end"):
            assert f"barrier '{name}': waiting" in output
            assert re.search(rf"barrier '{name}': passed after \d+\.\d\d s", output)
    assert float(re.search(r"barrier 'end': passed after (\S+) s", outputs[0])[1]) > 0.5


@pytest.mark.parametrize(
    ("scenario", "count", "name"),
    [
        ("missing", 2, "early"),
        pytest.param("unsaved", 2, "checkpoint: Checkpointer:save_start", marks=pytest.mark.slow),
    ],
)
def test_a_barrier_names_who_did_not_come(scenario, count, name):
    codes, outputs, _ = run(scenario, count)
    assert codes == [2] * count
    said = re.search(rf"barrier '{name}': process 1 \(host \S+, pid \d+\) did not arrive within \d s", outputs[0])
    assert said and all(said[0] in output for output in outputs)  # process 1, too, hears why it was ended


@pytest.mark.slow
def test_a_first_step_that_one_process_does_not_come_to_is_not_waited_for_endlessly():
    codes, outputs, _ = run("stuck")
    assert all(codes), outputs
    for rank in (0, 2):
        said = "the first step, with the first collectives, is not done after 15 s (train.processes.initialization_"
        assert codes[rank] == 2 and said in outputs[rank], outputs[rank]


def test_an_error_in_one_process_is_told_by_all():
    codes, outputs, _ = run("error", count=2)
    assert codes == [2, 2]
    assert re.search(r"^polygpt: process 1: the disk is full$", outputs[0], re.MULTILINE)


@pytest.mark.slow
def test_at_the_start_the_absent_are_numbered():
    codes, outputs, _ = run("absent", count=3, absent=1)
    assert all(codes)
    for output in outputs:
        assert "start-up: waiting for the other processes, 5 s at most" in output
        # The service's own words; the process is aborted before any of ours.
        assert re.search(r"tasks that reached the barrier: 2/3.*timed out task names:\s*2\n", output, re.DOTALL), output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "rank", "said"),
    [
        ("killed", 2, r"process 2 \(host \S+, pid \d+\) has sent no heartbeat for \d+ s: stopping"),
        ("frozen", 1, r"process 1 \(host \S+, pid \d+\) has sent no heartbeat for \d+ s: stopping"),
        ("first killed", 0, r"process 0 \(host \S+, pid \d+\), the coordinator, is gone"),
        ("first frozen", 0, r"process 0 \(host \S+, pid \d+\), the coordinator, has sent no heartbeat for \d+ s"),
    ],
)
def test_when_one_dies_the_others_say_who_and_end_within_the_bound(scenario, rank, said):
    codes, outputs, seconds = run(scenario, ends=rank)
    assert codes == [1, 1], outputs
    assert all(re.search(said, output) for output in outputs), outputs
    assert seconds < BOUND  # it is seen after seven tenths of it


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (
            "second killed",
            r"^polygpt: process 1 \(host \S+, pid \d+\) was killed by SIGKILL: stopping; the same command",
        ),
        ("killed at start-up", r"^polygpt: start-up: process 1 was killed by SIGKILL: stopping"),
    ],
)
def test_the_launcher_tells_the_survivor_who_was_killed(tmp_path, capfd, scenario, said):
    begun = time.monotonic()
    outcome = local.run([], 2, 1, tmp_path, grace=300, program=[sys.executable, str(SCRIPT), scenario])
    assert outcome.exit_codes == (1, -9) and re.search(said, capfd.readouterr().err, re.MULTILINE)
    assert time.monotonic() - begun < 200  # neither the heartbeats, 600 s, nor the grace period are waited for


@pytest.mark.parametrize("bound", ["barrier_timeout", "shutdown_timeout"])
def test_the_setting_that_bounds_a_barrier_is_named(monkeypatch, bound):
    client = mock.Mock()
    client.wait_at_barrier.side_effect = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
    client.key_value_dir_get.return_value = [("polygpt/barrier/end/0/0", "")]
    monkeypatch.setattr(processes._Group, "client", client)
    group = processes._Group(processes.ProcessesSpec(), 0, 2, ["process 0", "process 1"], collections.Counter())
    with pytest.raises(UserError, match=rf"'end': process 1 did not arrive .* \(train.processes.{bound}\)"):
        processes._meet(group, "end", bound)
