"""A learning rate that falls when the metric stops improving, also over a restart."""

import json

import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.errors import SpecError
from polygpt.overrides import override
from polygpt.training import trainer
from polygpt.training.held_out import MetricState
from polygpt.training.loggers import JsonLines
from polygpt.training.loop import train
from polygpt.training.plateau import Plateau
from polygpt.training.seeds import reason_against

METRICS = [5.0, 4.0, 4.5, 4.6, 3.0, 3.1, 3.2, 3.3]
SCALES = [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25]  # of the step after each evaluation but the last
SMALL = {"model.decoder.depth": "0", "optim.accumulate": "1", "train.steps": "8", "train.log_every": "1"}
SMALL |= {
    "train.evaluate_every": "1",
    "train.checkpoint.every": "1",
    "optim.schedule": "polygpt.optim.schedules:Constant",
}
SMALL |= {"optim.schedule.peak_lr": "0.01", "optim.schedule.warmup": "0"}


def chosen(steps, **fields):
    small = override(experiment(), SMALL | {"train.steps": str(steps)})
    return small.replace(train=small.train.replace(plateau=Plateau(**{"patience": 2, **fields})))


@pytest.fixture
def measured(monkeypatch):
    def measure(program, state, tokenizer, proceed):
        return METRICS[int(state.step) - 1], {"tasks": {}}

    monkeypatch.setattr(trainer, "measure", measure)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(experiment, workdir):
    train(experiment, workdir, lambda workdir, step, steps: [JsonLines(workdir, step)])
    return [line for line in lines(workdir) if "learning_rate" in line]


def test_the_rate_falls_after_so_many_evaluations_and_a_run_resumes_to_the_bit(measured, tmp_path):
    whole = run(chosen(8), tmp_path / "whole")
    np.testing.assert_allclose([line["learning_rate"] for line in whole], 0.01 * np.array(SCALES), rtol=1e-6)
    assert whole[4]["update_norm"] < 0.7 * whole[3]["update_norm"]
    for steps in (3, 5, 8):
        parts = run(chosen(steps), tmp_path / "parts")
    assert parts == whole


def test_it_falls_no_lower_than_the_limit():
    plateau, standing = Plateau(0.1, patience=1, min_scale=0.05), MetricState()
    for metric in (1.0, 2.0, 2.0, 2.0):
        standing.update(metric, "lower", plateau)
    assert standing.reductions == 3 and standing.stale == 3
    assert [plateau.scale(n) for n in range(4)] == [1.0, 0.1, 0.05, 0.05]


def test_what_does_not_fit_is_told():
    with pytest.raises(SpecError, match=r"TrainSpec.plateau is .*: it must be null without evaluate_every"):
        chosen(8).train.replace(evaluate_every=None)
    assert "train.plateau" in reason_against(chosen(8).train)


def test_the_progress_in_a_checkpoint_of_an_earlier_version_is_read():
    assert MetricState.restored({"best": 0.5, "stale": 1, "owed": True}) == MetricState(0.5, 1, pending=True)
