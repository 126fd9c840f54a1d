"""Runs one after the other, as they are trained alone."""

import json
import os
import signal

import pytest
from tiny_runs import experiment

from polygpt.ablation.engines.base import Task
from polygpt.ablation.engines.worker import work

pytestmark = pytest.mark.usefixtures("compiled_once")

LASTING = ("seed", "metrics", "curve", "evaluations", "steps", "diverged")


def run(folder, made, callback=lambda progress: None):
    task = Task("tiny", (made,), folder)
    return json.loads(work(task.to_json(), callback))[0]


def lasting(record):
    return {name: record[name] for name in LASTING}


def test_a_signal_saves_and_the_same_task_goes_on(tmp_path):
    made = experiment(train__patience=5, train__evaluate_every=6, optim__accumulate=1, model__decoder__depth=0)

    def interrupt(progress):
        if progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    told = []
    whole = run(tmp_path / "whole", made, lambda progress: told.append((progress.task, progress.seeds, progress.step)))
    assert told == [("tiny", (0,), step) for step in range(1, 13)]
    assert (whole["how"], whole["steps"], whole["evaluations"]["step"]) == ("a run of its own", 12, [6, 12])
    assert whole["seconds"] > 0

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", made, interrupt)
    again = []
    assert lasting(run(tmp_path / "cut", made, lambda progress: again.append(progress.step))) == lasting(whole)
    assert 8 <= again[0] and again[-1] == 12
    assert lasting(run(tmp_path / "cut", made, pytest.fail)) == lasting(whole)


@pytest.mark.slow
def test_what_is_not_evaluated_on_the_way_is_evaluated_in_the_end(tmp_path):
    found = run(
        tmp_path,
        experiment(
            train__spikes=None, train__patience=None, train__evaluate_every=None, train__steps=4, train__parallel="pmap"
        ),
    )
    assert found["how"] == "a run of its own"
    assert found["evaluations"]["step"] == [4] and found["metrics"]["text/loss"] > 0


@pytest.mark.slow
def test_patience_ends_a_run_and_its_record(tmp_path):
    still = experiment(train__patience=1, train__evaluate_every=3, optim__schedule__peak_lr=1e-30)
    found = run(tmp_path, still)
    assert found["steps"] == found["evaluations"]["step"][-1] < 12
    assert "text/loss" in found["metrics"] and not found["diverged"]
