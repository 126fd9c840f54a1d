"""A fault that one of two processes meets: both end soon and say whose it was, or both go on alike."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polygpt.runtime import manifest
from polygpt.runtime.processes import COORDINATOR, PROCESS, PROCESSES

SCRIPT = Path(__file__).with_name("fault_in_one.py")


def run(fault, workdir):
    """Codes and what is said by the two processes, and the seconds that they took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    begun = time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, fault, workdir],
            env=os.environ
            | {COORDINATOR: place, PROCESSES: "2", PROCESS: str(i), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said, time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "code", "error"),
    [
        ("exit", 0, 1, "SystemExit: 1"),
        ("evaluation", 1, 2, "a held-out file is torn"),
        ("disk", 0, 2, r"cannot write \S+/metrics.jsonl: No space left on device: free some space .*"),
    ],
)
def test_the_other_says_whose_fault_it_was(tmp_path, fault, rank, code, error):
    codes, said, seconds = run(fault, tmp_path)
    assert codes == [code, code], said
    other = re.search(r"polygpt: process \d.*", said[1 - rank])
    how = (
        rf"process {rank}: {error}" if code == 2 else rf"process {rank} \(host \S+, pid \d+\) failed: {error}: stopping"
    )
    assert re.fullmatch(f"polygpt: {how}", other[0]), said
    assert seconds < 120  # far below every bound on waiting


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "said"), [("full", "No space left on device"), ("locked", "Permission denied")])
def test_where_one_cannot_write_its_part_of_a_checkpoint_both_say_why_and_the_one_before_is_whole(
    tmp_path, fault, said
):
    codes, texts, seconds = run(fault, tmp_path)
    assert codes == [2, 2], texts
    error = rf"cannot write {tmp_path}/checkpoints/4/d: {said}: "
    assert re.search(rf"^polygpt: process 1: {error}", texts[0], re.M), texts
    assert re.search(rf"^polygpt: {error}", texts[1], re.M), texts
    assert seconds < 120  # and not a barrier's 600
    assert [record.step for record in manifest.records(tmp_path / "checkpoints")] == [2]
    manifest.verify(tmp_path / "checkpoints" / "2")


@pytest.mark.slow
def test_other_data_in_one_is_refused_by_both_before_the_first_step(tmp_path):
    codes, said, _ = run("data", tmp_path / "run")
    assert set(codes) <= {1, 2}, said  # one may be told by the other before it says so itself
    for text in said:
        assert re.search(r"task 'text' has (\d+) examples in process 0 and \d+ in process 1: all processes", text)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_that_one_cannot_read_is_opened_by_none(tmp_path):
    codes, said, _ = run("checkpoint", tmp_path)
    assert codes == [0, 0], said
    for text in said:
        assert "opened 4\n" in text and "checkpoints/6: d/x cannot be read: Input/output error" in text
