"""Costs as metrics: what they are, against counts made another way, and runs that measure them."""

from types import SimpleNamespace

import pytest
from tiny_runs import experiment

from polygpt.ablation import measures
from polygpt.ablation.budget import costs
from polygpt.ablation.measures import MEASURES, cache_bytes, decode_seconds, figures, lacks, measure
from polygpt.ablation.results import read
from polygpt.ablation.runner import run_all
from polygpt.ablation.study import Ablation
from polygpt.attention.multi_head import MultiHead
from polygpt.errors import SpecError
from polygpt.models.low_rank import LowRank

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_the_cache_is_keys_and_values_and_what_is_known_of_positions():
    whole = experiment(model__decoder__attention=MultiHead(heads=4), model__decoder__depth=2)
    half = experiment(model__decoder__attention=MultiHead(heads=4, kv_heads=2), model__decoder__depth=2)
    assert cache_bytes(whole) - cache_bytes(half) == 2 * 2 * (48 * 16 // 2) * 4  # depth, key and value, float32
    longer = experiment(model__decoder__attention=MultiHead(heads=4), model__decoder__depth=2, data__layout__seq_len=96)
    assert cache_bytes(longer) == pytest.approx(2 * cache_bytes(whole), rel=0.02)


def test_decoding_time_is_the_median_per_token_without_the_run_that_compiles(monkeypatch):
    clock, counts, spans = [0.0], [], iter([100.0, 0.9, 0.1, 0.2, 0.3, 0.4])  # seconds a token

    def decode(model, choice, params, state, never, size):
        assert model.spec.low_rank is None, "merged, as in an opened run"
        counts.append(int(size))
        clock[0] += next(spans) * (size - 1)  # the first token comes of the prompt
        return state

    monkeypatch.setattr(measures, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(measures.decoding, "decode", decode)
    assert decode_seconds(experiment(model__low_rank=LowRank("query"))) == pytest.approx(0.3)
    assert counts == [48 - 1 - 2 * 12] * 6, "what a row of 48 has left behind <bos> and a dozen of letters and spaces"


def test_figures_of_a_line_hold_its_costs_and_an_older_line_lacks_what_nobody_measured():
    line = {"metrics": {"text/loss": 1.0}, "parameters": 7, "flops": 8.0, "seconds": 2.0}
    assert figures(line) == {"text/loss": 1.0, "cost/parameters": 7, "cost/flops": 8.0, "cost/seconds": 2.0}
    assert not lacks(line, ["text/loss", "cost/flops", "text/wer"]) and lacks(line, ["cost/decode_seconds"])


def test_every_cost_is_a_metric_whose_lower_values_are_better():
    assert {one.better for one in MEASURES.values()} == {"lower"}
    assert all(measure(experiment(), name).unit or name == "cost/parameters" for name in MEASURES)
    with pytest.raises(SpecError, match="belongs to no held-out task"):
        measure(experiment(), "cost/joules")


def test_a_run_without_the_cost_that_is_asked_for_is_made_again(tmp_path):
    made = experiment(train__steps=2, optim__accumulate=1, optim__ema=None)
    asked = Ablation("How fast?", made, {"base": {}}, seeds=1)
    first = run_all(asked, tmp_path)
    line = first.records[0]
    assert line["metrics"]["cost/cache_bytes"] == cache_bytes(asked.base)
    assert "cost/decode_seconds" not in line["metrics"]
    timed = asked.replace(metric="cost/decode_seconds", reads={})
    assert 0 < run_all(timed, tmp_path).values["base"][0] < 0.1
    flops = asked.replace(metric="cost/flops")
    assert run_all(flops, tmp_path).values["base"][0] == 2 * costs(asked.base).flops
    assert len(read(tmp_path / "results.jsonl")) == 2
