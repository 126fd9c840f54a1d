"""From a run's folder to a report's content, whatever is missing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from polygpt.report import gather


@pytest.fixture
def folder(tmp_path):
    lines = [{"step": step, "loss": 1 / step, "loss/a": 1.0, "loss/b": 2.0, "skipped": 0.0} for step in (10, 20, 30)]
    lines[1]["loss"] = None
    held_out = {"tasks": {"fusion": {"loss": 0.5, "accuracy": 0.75, "n": 8}, "text": {"loss": 2.0}}}
    held_out["modality_gain"] = {"fusion/image": {"gain": 0.3, "low": 0.1, "high": 0.5}}
    lines.insert(2, {"step": 20, "evaluation": held_out | {"metric": 0.5}})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 40, "lo')
    timing = [{"step": step, "tokens_per_second": 1000.0 + step, "input_wait": 0.01} for step in (10, 20, 20, 30)]
    (tmp_path / "timing.jsonl").write_text("\n".join(map(json.dumps, timing)) + "\n[]\n")
    (tmp_path / "environment.json").write_text('{"jax": "0.10.2", "devi')
    return tmp_path


def test_lines_and_files_cut_short_are_read_as_far_as_they_go(folder):
    assert [line["step"] for line in gather.read_lines(folder / "metrics.jsonl")] == [10, 20, 20, 30]
    assert gather.read_lines(folder / "none.jsonl") == []
    assert gather.read_json(folder / "environment.json") is None
    assert gather.read_json(folder / "none.json") is None


def test_charts_in_their_order_with_a_line_a_task(folder):
    charts = gather.charts(gather.read_lines(folder / "metrics.jsonl"), gather.read_lines(folder / "timing.jsonl"))
    titles = [chart.title for chart in charts]
    assert titles == [
        "Training loss",
        "Objectives",
        "Held-out accuracy",
        "Held-out loss",
        "Held-out modality gain",
        "Speed",
        "Input wait",
    ]
    loss, objectives, _, held_out, gain, speed, _ = charts
    assert loss.lines[0].steps == (10, 20, 30)
    np.testing.assert_allclose(loss.lines[0].values, [0.1, np.nan, 1 / 30])
    assert [line.name for line in objectives.lines] == ["a", "b"]
    assert [(line.name, line.values) for line in held_out.lines] == [("fusion", (0.5,)), ("text", (2.0,))]
    assert gain.lines[0].name == "fusion/image" and gain.lines[0].values == (0.3,)
    assert speed.lines[0].steps == (10, 20, 30), "a step measured twice counts once"


def test_the_latest_evaluation_up_to_the_checkpoint(folder):
    metrics = gather.read_lines(folder / "metrics.jsonl")
    assert gather.last_evaluation(metrics, 30)["step"] == 20
    assert gather.last_evaluation(metrics, 30)["tasks"]["fusion"]["accuracy"] == 0.75
    assert gather.last_evaluation(metrics, 19) is None


def test_facts_say_what_is_known(folder):
    model = SimpleNamespace(spec=SimpleNamespace(adapters={"image": None}))
    experiment = SimpleNamespace(train=SimpleNamespace(steps=50))
    params = {"a": np.zeros((10, 100)), "b": np.zeros(24)}
    run = SimpleNamespace(params=params, step=30, model=model, experiment=experiment)
    found = dict(gather.facts(run, gather.read_lines(folder / "timing.jsonl"), {"device": "2 x cpu"}))
    assert found["step"] == "30 of 50" and found["parameters"] == "1,024" and found["reads"] == "text, image"
    assert found["median speed"] == "1,020 tokens/s" and found["device"] == "2 x cpu"
    assert "median speed" not in dict(gather.facts(run, [], None))
