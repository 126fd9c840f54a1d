"""From a run's folder to a report's content, whatever is missing."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import made_up_report
from polygpt.files import plain
from polygpt.models.multimodal import ModelSpec
from polygpt.report import finish, gather
from polygpt.training.loggers import JsonLines


def held_out(loss):
    """Figures as `evaluate` gives them."""
    fusion = {"loss": loss, "perplexity": math.inf, "accuracy": 0.75, "n": 8}
    return {
        "tasks": {"fusion": fusion, "a/text": {"loss": 2.0, "n": 4}},
        "modalities": {"image": fusion},
        "modality_gain": {"fusion/image": {"gain": 0.3, "low": 0.1, "high": 0.5, "n": 8}},
    }


@pytest.fixture
def folder(tmp_path):
    """What training's own logger writes, and a kill in the middle of a line."""
    logger = JsonLines(tmp_path, 0)
    for step in (10, 20, 30):
        loss = math.nan if step == 20 else 1 / step
        logger.metrics(step, {"loss": loss, "loss/a": 1.0, "loss/b": 2.0, "skipped": 3.0})
        logger.timing(step, {"tokens_per_second": 1000.0 + step, "input_wait": 0.01})
        if step > 10:
            logger.evaluation(step, held_out(10 / step) | {"metric": 0.5})
    logger.timing(20, {"tokens_per_second": 1020.0, "input_wait": 0.01})
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write("[]\n")
    (tmp_path / "environment.json").write_text('{"jax": "0.10.2", "devi')
    return tmp_path


def test_lines_and_files_cut_short_are_read_as_far_as_they_go(folder):
    assert [line["step"] for line in gather.read_lines(folder / "metrics.jsonl")] == [10, 20, 20, 30, 30]
    assert gather.read_lines(folder / "none.jsonl") == []
    assert gather.read_json(folder / "environment.json") is None
    assert gather.read_json(folder / "none.json") is None


def test_charts_in_their_order_with_a_line_a_task(folder):
    lines = [gather.read_lines(folder / name) for name in ("metrics.jsonl", "timing.jsonl")]
    charts = gather.charts(*lines, made_up_report.content().measures)
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
    loss, objectives, _, losses, gain, speed, _ = charts
    assert loss.lines[0].steps == (10, 20, 30)
    np.testing.assert_allclose(loss.lines[0].values, [0.1, np.nan, 1 / 30])
    assert [line.name for line in objectives.lines] == ["a", "b"]
    assert [(line.name, line.steps) for line in losses.lines] == [("fusion", (20, 30)), ("a/text", (20, 30))]
    assert losses.lines[0].values == (0.5, pytest.approx(1 / 3))
    assert gain.lines[0].name == "fusion/image" and gain.lines[0].values == (0.3, 0.3)
    assert speed.lines[0].steps == (10, 20, 30), "a step measured twice counts once"


def test_the_latest_evaluation_up_to_the_checkpoint(folder):
    metrics = gather.read_lines(folder / "metrics.jsonl")
    assert gather.last_evaluation(metrics, 29) == plain({"step": 20, **held_out(0.5)})
    assert gather.last_evaluation(metrics, 30)["step"] == 30
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


@pytest.fixture
def run(folder, monkeypatch):
    """A run of which only the folder is real."""
    monkeypatch.setattr(gather.samples, "gather", lambda run: ({}, ()))
    monkeypatch.setattr(gather.spec, "to_json", lambda experiment: {})
    model = SimpleNamespace(spec=ModelSpec())
    layout, train = SimpleNamespace(layout=None), SimpleNamespace(steps=30)
    evaluation = SimpleNamespace(measures=lambda: made_up_report.content().measures, tasks={})
    experiment = SimpleNamespace(name="made", train=train, data=layout, evaluation=evaluation)
    params = {"a": np.zeros(3)}
    given = {"params": params, "step": 30, "model": model, "experiment": experiment, "workdir": folder}
    return SimpleNamespace(**given, tokenizer=None, adapter=None)


def test_a_report_without_evaluation_shows_that_of_training(run):
    page = finish.write_report(run).read_text()
    assert 'id="results"' in page and "Held-out loss" in page and "+0.300" in page and "75.0%" in page
    assert "the held-out results are of step 30" in page and "3 updates were skipped" in page
    assert 'id="time"' not in page


@pytest.mark.parametrize(("step", "shown"), [(30, "99.9%"), (20, "75.0%")])
def test_results_of_another_checkpoint_are_not_shown(run, step, shown):
    """Those in the folder count where they are of the run's step, 30; else the report has what training measured."""
    results = plain({"step": step, **held_out(0.5)})
    results["tasks"]["fusion"]["accuracy"] = 0.999
    (run.workdir / finish.RESULTS).write_text(json.dumps(results))
    page = finish.write_report(run).read_text()
    assert shown in page and ("99.9%" in page) == (step == 30)


def test_a_report_says_which_task_failed_and_what_was_changed(run, monkeypatch):
    def evaluate(*given, progress, proceed, faults):
        faults["poems"] = "poems 3: empty text"
        return held_out(0.5)

    monkeypatch.setattr(finish, "evaluate", evaluate)
    changed = {"evaluation.tasks.fusion.limit": "8"}
    results = finish.evaluate_run(run, overrides=changed)
    assert (results["faults"], results["overrides"]) == ({"poems": "poems 3: empty text"}, changed)
    assert json.loads((run.workdir / finish.RESULTS).read_text())["faults"] == results["faults"]
    page = finish.write_report(run).read_text()
    assert "poems 3: empty text" in page and "--evaluation.tasks.fusion.limit 8" in page


def test_a_report_says_where_the_time_went_over_all_restarts(run):
    lines = [
        {"from": 0, "step": 20, "seconds": {"compile": 10.0, "productive": 60.0}},
        {"from": 20, "step": 25, "seconds": {"productive": 20.0}},
        {"from": 20, "step": 20, "seconds": {"restart": 10.0, "down": 20.0}},
        {"from": 20, "step": 30, "seconds": {"productive": 40.0}},
    ]
    (run.workdir / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"fro')
    page = finish.write_report(run).read_text()
    assert "Goodput is 62.5%: the share of 2:40" in page
    assert '<th scope="row" class="time lost">lost</th><td class="number">20.00 s</td><td class="number">12.5%' in page
    assert (
        '<th scope="row" class="time down">down</th><td class="number">20.00 s</td>' in page and "down is the" in page
    )


def test_what_is_not_finite_is_null_in_the_results_and_blank_in_the_report(run, monkeypatch):
    found = held_out(800.0)
    found["modality_gain"]["fusion/audio"] = {"gain": math.nan, "low": math.nan, "high": math.nan, "n": 2}
    monkeypatch.setattr(finish, "evaluate", lambda *given, progress, proceed, faults: found)
    finish.evaluate_run(run)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((run.workdir / finish.RESULTS).read_text(), parse_constant=refuse)
    assert read["tasks"]["fusion"] == {"loss": 800.0, "perplexity": None, "accuracy": 0.75, "n": 8}
    page = finish.write_report(run).read_text()
    assert "fusion/image" in page and "fusion/audio" not in page
