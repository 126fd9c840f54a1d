"""What is kept of a run."""

import json
import math

import numpy as np
import pytest
from tiny_runs import experiment

from polygpt.ablation.measures import cache_bytes
from polygpt.ablation.record import finite_mean, record


def of(losses, evaluations=(), **settings):
    settings = {"stopped": False, "seconds": 1.0, "how": "by hand"} | settings
    return record(experiment(seed=3), np.asarray(losses, np.float32), list(evaluations), **settings)


def test_a_curve_is_thinned_to_sixty_means():
    losses = np.arange(1, 601)
    curve = of(losses)["curve"]
    assert curve["step"] == list(range(10, 601, 10))
    assert curve["loss"] == [5.5 + 10 * i for i in range(60)]
    uneven = of(np.ones(61))["curve"]
    assert len(uneven["step"]) == 60 and uneven["step"][-1] == 61 and set(uneven["loss"]) == {1.0}
    assert of([3.0, 2.0])["curve"] == {"step": [1, 2], "loss": [3.0, 2.0]}


def test_the_training_loss_is_the_mean_of_the_last_tenth():
    assert of([*[9.0] * 18, 1.0, 2.0])["metrics"]["train/loss"] == 1.5
    assert of([9.0, 4.0])["metrics"]["train/loss"] == 4.0
    assert of([*[9.0] * 18, math.nan, 2.0])["metrics"]["train/loss"] == 2.0, "its update was left out"


def test_metrics_are_those_of_the_last_step():
    tasks = {"text": {"loss": 2.0, "perplexity": math.e**2, "n": 8}, "more": {"loss": 1.0, "n": 8, "skipped": 1}}
    early = {"text": {"loss": 3.0, "perplexity": math.e**3, "n": 8}, "more": {"loss": 2.0, "n": 8, "skipped": 1}}
    found = of(np.ones(12), [(5, early), (12, tasks)])
    cache = {"cost/cache_bytes": cache_bytes(experiment())}
    held_out = {"text/loss": 2.0, "text/perplexity": math.e**2, "more/loss": 1.0}
    assert found["metrics"] == {**held_out, "train/loss": 1.0, **cache}
    assert found["evaluations"]["step"] == [5, 12] and found["evaluations"]["text/loss"] == [3.0, 2.0]
    assert of(np.ones(12), [(5, early)])["metrics"] == {"train/loss": 1.0, **cache}


def test_evaluations_are_thinned_to_sixty_and_the_last_stays():
    found = of(np.ones(200), [(n, {"text": {"loss": float(n)}}) for n in range(1, 201)])["evaluations"]
    assert len(found["step"]) <= 60 and found["step"][-1] == 200 and found["text/loss"] == found["step"]
    assert {b - a for a, b in zip(found["step"], found["step"][1:], strict=False)} == {4}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_final_loss_that_is_not_finite_is_a_run_that_diverged(loss):
    assert not of(np.ones(12), [(12, {"text": {"loss": 1.0, "perplexity": math.inf}})])["diverged"]
    found = of(np.ones(12), [(12, {"text": {"loss": loss}})])
    assert found["diverged"] and found["metrics"]["text/loss"] is None
    assert of([1.0, loss])["diverged"] and of([1.0, 1.0], stopped=True)["diverged"]
    json.dumps(found, allow_nan=False)


def test_it_says_what_it_took():
    found = of(np.ones(7), seconds=3.25)
    assert (found["seed"], found["steps"], found["tokens"], found["seconds"]) == (3, 7, 7 * 4 * 48, 3.25)
    assert found["flops"] == pytest.approx(of(np.ones(14))["flops"] / 2)
    assert found["parameters"] > 258 * 16
    assert found["made"].keys() == {"polygpt", "commit", "jax", "device", "code"} and found["made"]["device"] == "cpu"


def test_the_mean_of_nothing_is_not_a_number():
    assert math.isnan(finite_mean(np.array([np.nan, np.inf]))) and math.isnan(finite_mean(np.array([])))
