"""Where the time goes: every moment in one category, over restarts too."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polygpt.runtime.goodput import CATEGORIES, LOST, Goodput, duration, process_begun, read, summary, table


def wall(lines):
    return lines[-1]["end"] - lines[0]["begin"]


def test_every_moment_goes_to_one_category_and_the_inner_one_counts(tmp_path):
    clock = Goodput(tmp_path / "goodput.jsonl", begun=time.time() - 5)
    clock.begin(0)
    clock.switch("other")
    with clock.track("evaluation"):
        time.sleep(0.02)
        with clock.track("checkpoint"):
            time.sleep(0.05)
    clock.record(1)
    clock.record(2, least=60.0)
    clock.end(3, finished=True)
    clock.close()
    lines = read(tmp_path / "goodput.jsonl")
    assert [(line["from"], line["step"]) for line in lines] == [(0, 0), (0, 1), (1, 3), (3, 3)]
    assert [line.get("finished") for line in lines] == [None, None, None, True]
    assert all(after["begin"] == before["end"] for before, after in zip(lines, lines[1:], strict=False))
    found = summary(lines)
    assert found.keys() == CATEGORIES.keys()
    assert sum(found.values()) == pytest.approx(wall(lines), abs=1e-4)
    assert found["startup"] == pytest.approx(5, abs=0.5) and found["restart"] == found["down"] == 0
    assert 0.02 <= found["evaluation"] < 0.05 <= found["checkpoint"] < 1


def test_after_a_kill_the_time_up_to_the_last_sign_of_life_is_lost_and_then_the_run_is_down(tmp_path):
    path, now = tmp_path / "goodput.jsonl", time.time()
    first = {"begin": now - 100, "end": now - 60, "from": 0, "step": 4, "seconds": {"productive": 40.0}}
    path.write_text(json.dumps(first) + '\n{"begin": 17')
    os.utime(path, (now - 45, now - 45))
    clock = Goodput(path, begun=now - 10)
    clock.begin(4)
    clock.close()
    lines = read(path)
    assert lines[0] == first and lines[1]["begin"] == first["end"]
    assert lines[1]["seconds"]["lost"] == pytest.approx(15, abs=0.1)
    assert lines[1]["seconds"]["down"] == pytest.approx(35, abs=0.1)
    assert lines[1]["seconds"]["restart"] == pytest.approx(10, abs=1) and "startup" not in lines[1]["seconds"]
    assert sum(summary(lines).values()) == pytest.approx(wall(lines), abs=1e-4)


def test_a_process_killed_while_it_starts_was_alive(tmp_path, monkeypatch):
    path, now = tmp_path / "goodput.jsonl", time.time()
    first = {"begin": now - 100, "end": now - 60, "from": 0, "step": 4, "seconds": {"productive": 40.0}}
    path.write_text(json.dumps(first) + "\n")
    os.utime(path, (now - 60, now - 60))
    killed = Goodput(path, begun=now - 30)
    killed.open()  # and restores, until
    os.utime(path, (now + 20, now + 20))
    monkeypatch.setattr(time, "time", lambda: now + 30)
    after = Goodput(path, begun=now + 25)
    after.begin(0)
    after.close()
    found = summary(read(path))
    assert found["down"] == pytest.approx(30 + 5, abs=1), "before the first start, and between the two"
    assert found["restart"] == pytest.approx(30 + 5, abs=1) and found["lost"] == pytest.approx(40 + 20, abs=1)
    assert sum(found.values()) == pytest.approx(wall(read(path)), abs=1e-4)


def test_a_finished_run_that_is_looked_at_stays_finished(tmp_path):
    path = tmp_path / "goodput.jsonl"
    path.write_text(
        json.dumps({"begin": 0.0, "end": 1.0, "from": 0, "step": 4, "seconds": {}, "finished": True}) + "\n"
    )
    before = path.read_text()
    clock = Goodput(path)
    clock.open()
    clock.end(4, finished=True)
    clock.close()
    assert path.read_text() == before


def test_a_finished_run_that_is_given_more_steps_does_not_count_the_days_between(tmp_path):
    path = tmp_path / "goodput.jsonl"
    line = {"begin": 0.0, "end": 10.0, "from": 0, "step": 4, "seconds": {"productive": 10.0}, "finished": True}
    path.write_text(json.dumps(line) + "\n")
    clock = Goodput(path)
    clock.begin(4)
    clock.close()
    found = summary(read(path))
    assert sum(found.values()) == pytest.approx(10, abs=1) and found["down"] == found["startup"] == 0


def test_steps_that_are_done_again_are_lost():
    def line(first, last, **seconds):
        return {"begin": 0, "end": 0, "from": first, "step": last, "seconds": seconds}

    lines = [
        line(0, 0, startup=3.0),
        line(0, 10, productive=8.0, compile=5.0, checkpoint=1.0),
        line(10, 14, productive=4.0, input_wait=0.5),
        line(14, 20, productive=6.0, evaluation=2.0, checkpoint=1.0),
        line(10, 10, restart=2.0, down=7.0),  # the checkpoint of step 20 was not whole
        line(10, 20, productive=10.0, compile=5.0),
    ]
    found = summary(lines)
    assert found["productive"] == 18 and found["lost"] == 4 + 0.5 + 6 + 2 + 1
    assert (found["compile"], found["startup"], found["restart"], found["down"]) == (10, 3, 2, 7)
    assert found["checkpoint"] == 1
    assert sum(found.values()) == sum(sum(line["seconds"].values()) for line in lines)
    assert set(LOST) < CATEGORIES.keys() and summary([]) == {}


def test_the_table_is_for_a_person():
    seconds = dict.fromkeys(CATEGORIES, 0.0) | {"productive": 5400.0, "input_wait": 30.0, "startup": 570.0}
    assert table(seconds).splitlines() == [
        "goodput 90.0% of 1:40:00",
        "  productive      1:30:00   90.0%",
        "  input wait      30.00 s    0.5%",
        "  startup            9:30    9.5%",
    ]
    assert [duration(value) for value in (0.5, 59.9, 61, 3600 * 49 + 62)] == ["0.50 s", "59.90 s", "1:01", "49:01:02"]


def test_the_process_knows_when_it_was_started():
    begun = process_begun()
    assert begun is None or 0 < time.time() - begun < 24 * 3600


def test_a_full_disk_does_not_end_the_run_and_the_interval_goes_on(tmp_path, monkeypatch):
    clock = Goodput(tmp_path / "goodput.jsonl")
    clock.begin(0)
    file, clock._file = clock._file, Path("/dev/full").open("ab", buffering=0)
    clock.record(1)
    clock._file.close()
    clock._file = file
    clock.record(2)
    clock.close()
    lines = read(tmp_path / "goodput.jsonl")
    assert [(line["from"], line["step"]) for line in lines] == [(0, 0), (0, 2), (2, 2)]
    assert sum(summary(lines).values()) == pytest.approx(wall(lines), abs=1e-4)


EXPERIMENT = Path(__file__).parents[1] / "training" / "tiny_experiment.py"


@pytest.mark.slow
def test_a_run_restarted_five_times_adds_up_to_its_wall_time(tmp_path):
    command = [Path(sys.executable).with_name("polygpt"), "train", EXPERIMENT, "--workdir", tmp_path, "--no-report"]
    command += ["--train.steps", "1000000", "--train.checkpoint.every", "50", "--train.evaluate_every", "400"]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    rng = random.Random(0)
    path = tmp_path / "goodput.jsonl"

    def start():
        """A process that has begun to train."""
        before = path.read_text().count("\n") if path.exists() else 0
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not path.exists() or path.read_text().count("\n") < before + 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        return process

    begin = time.time()
    for number in signals:
        process = start()
        time.sleep(rng.uniform(0.5, 3.0))
        process.send_signal(number)
        process.communicate()
    process = start()
    time.sleep(20.0)
    process.send_signal(signal.SIGTERM)
    # To the line in which it gives its account: how long the interpreter then takes to end it cannot know.
    account = next((line for line in process.stdout if re.search(r"goodput [\d.]+% of", line)), None)
    took = time.time() - begin
    process.communicate()
    found = summary(read(path))
    print(table(found), f"measured {took:.2f} s", sep="\n")
    whole = sum(found.values())
    assert whole == pytest.approx(took, rel=0.02)
    assert (
        found["lost"] > 0
        and found["startup"] > 0
        and found["restart"] > 0
        and found["down"] > 0
        and found["productive"] > 0
    )
    assert account is not None, "it is printed at the end"
