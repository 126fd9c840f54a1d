"""Settings that do not fit together are refused when an experiment is made."""

import pytest
from tiny_experiment import experiment

from polygpt.errors import SpecError
from polygpt.objectives.masked_lm import MaskedLM, MaskTokens
from polygpt.overrides import override
from polygpt.sharding import RULES
from polygpt.training.experiment import TrainSpec


@pytest.mark.parametrize("parallel", ["single", "pmap", "auto"])
def test_a_mesh_that_nothing_would_read_is_refused(parallel):
    wanted = (
        rf"'{parallel}', which ignores the mesh, but train.mesh.tensor and train.mesh.microbatches are set: write "
        "--train.parallel sharded, or reset it with --train.mesh.tensor 1 --train.mesh.microbatches null"
    )
    with pytest.raises(SpecError, match=wanted):
        changes = {"train.parallel": parallel, "train.mesh.tensor": "3", "train.mesh.microbatches": "2"}
        override(experiment(), changes)


def test_a_table_that_nothing_would_read_is_refused():
    with pytest.raises(SpecError, match="train.mesh.rules is set: write --train.parallel sharded$"):
        override(experiment(), {"train.mesh.rules.features": '["tensor"]'})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"log_every": 0}, "log_every is 0: it must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every is 0: it must be null or at least 1"),
        ({"evaluate_every": 1, "patience": 0}, "patience is 0: it must be null or at least 1"),
        ({"patience": 1}, "patience is 1: it must be null without evaluate_every"),
        ({"max_nonfinite": 0}, "max_nonfinite is 0: it must be at least 1"),
        ({"prefetch": 0}, "prefetch is 0: it must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_counts_below_one_are_refused(changes, message):
    one = {"steps": 1, "log_every": 1, "max_nonfinite": 1, "prefetch": 1, "patience": None, "evaluate_every": None}
    assert TrainSpec(**one).prefetch == TrainSpec(**one | {"evaluate_every": 1, "patience": 1}).patience == 1
    with pytest.raises(SpecError, match=f"TrainSpec.{message}"):
        TrainSpec(**one | changes)


def test_the_mesh_of_a_sharded_run_and_the_default_of_any_are_taken():
    assert override(experiment(), {"train.parallel": "sharded", "train.mesh.tensor": "3"}).train.mesh.tensor == 3
    same = {"train.parallel": "auto", "train.mesh.data": "-1", "train.mesh.rules.features": "[]"}
    assert override(experiment(), same).train.mesh.rules == RULES


@pytest.mark.parametrize("field", ["media_span", "prompt_span"])
def test_spans_that_the_mask_ignores_are_refused(field):
    chosen = override(experiment(), {f"data.layout.{field}": "bidirectional"})
    with pytest.raises(SpecError, match=rf"{field} is 'bidirectional': it must be causal, or model\.decoder\.mask"):
        override(chosen, {"model.decoder.mask": "causal"})


def test_a_metric_that_the_mask_makes_meaningless_is_refused():
    masked = {"m": (MaskedLM(MaskTokens(0, 9)), 1.0)}
    chosen = experiment().replace(objectives=masked)
    with pytest.raises(SpecError, match=r"train\.metric is 'loss', which scores next tokens, and .*'bidirectional'"):
        override(chosen, {"model.decoder.mask": "bidirectional"})
    override(chosen, {"model.decoder.mask": "bidirectional", "train.evaluate_every": "null"})
