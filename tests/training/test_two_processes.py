"""Two processes in one loop: a signal to one ends both after the same step, and a rewind is one of both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from polygpt.runtime.manifest import Record, records
from polygpt.runtime.processes import COORDINATOR, PROCESS, PROCESSES

SCRIPT = Path(__file__).with_name("two_processes.py")


def run(workdir, at=(0, 0), mode="sharded", changes=()):
    """What the two processes say of their outcomes; process i gets a SIGTERM at at[i], see the script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, workdir, str(at[rank]), mode, json.dumps(dict(changes))],
            env=os.environ | {COORDINATOR: place, PROCESSES: "2", PROCESS: str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        found = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(err for _, err in found)
    for _, err in found:  # Orbax's barriers are ours, in its thread too, and all compile before any goes on
        assert all(
            f"barrier 'checkpoint: {name}" in err for name in ("Checkpointer:save_start", "async_commit_complete")
        ), err
        assert "barrier 'compiled': passed" in err
    outcomes = {out.splitlines()[-1] for out, _ in found}
    assert len(outcomes) == 1, "both end after the same step"
    _, step, finished = outcomes.pop().split()
    return int(step), finished == "True"


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_and_the_run_goes_on_to_the_bit(tmp_path):
    assert run(tmp_path / "whole") == (16, True)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9), 8, 9, *range(9, 17), 16]
    assert lines[9] == {"step": 9, "rewound_from": 11} and lines[-2]["rewinds"] == 1

    cut = tmp_path / "cut"
    assert run(cut, at=(0, 3)) == (5, False), "two steps later: by then the other has been told"
    assert [record.step for record in records(cut / "checkpoints")] == [4, 5]
    assert run(cut, at=(4, 0)) == (8, False), "both began six steps more, and the last made the rewind due"
    assert run(cut) == (16, True)
    assert (cut / "metrics.jsonl").read_bytes() == whole

    evaluating = tmp_path / "evaluating"
    assert run(evaluating, at=(0, "evaluating 1")) == (8, False), "two batches later, before the evaluation is done"
    assert records(evaluating / "checkpoints")[-1] == Record(8, None, True)
    assert run(evaluating) == (16, True)
    assert (evaluating / "metrics.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_pmap_over_two_processes_is_saved_and_goes_on(tmp_path):
    assert run(tmp_path, at=(3, 0), mode="pmap") == (5, False)
    assert run(tmp_path, mode="pmap") == (16, True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["step"] == 16 and lines[-2]["rewinds"] == 1


@pytest.mark.slow
def test_the_clock_of_the_first_process_saves_in_both_at_the_same_step(tmp_path):
    changes = {"train.checkpoint.every": "100", "train.checkpoint.every_minutes": "0.0001", "train.steps": "9"}
    assert run(tmp_path, changes=changes | {"train.evaluate_every": "null"}) == (9, True)
    assert [record.step for record in records(tmp_path / "checkpoints")] == [8, 9], "told after step 4"
