"""A run whose logits exist a few positions at a time is the run with all of them, up to rounding."""

import json

import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.errors import SpecError
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.z_loss import ZLoss
from polygpt.overrides import override
from polygpt.training.loggers import JsonLines
from polygpt.training.loop import train

CHANGES = {
    "train.steps": "4",
    "train.evaluate_every": "2",
    "train.log_every": "1",
    "model.decoder.depth": "0",
    "evaluation.tasks.text.limit": "4",
}


def lines(block, workdir, **more):
    chosen = override(experiment(), CHANGES | {"model.logits_block": block, **more})
    chosen = chosen.replace(objectives={"next_token": (NextToken(label_smoothing=0.1), 1.0), "z": (ZLoss(), 1e-2)})
    train(chosen, workdir, lambda *where: [JsonLines(*where[:2])])
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(tree):
    if isinstance(tree, dict):
        return {f"{a}/{b}": x for a, item in tree.items() for b, x in numbers(item).items() if a != "seconds"}
    return {"": tree} if isinstance(tree, float) else {}


def test_losses_norms_and_evaluations_are_those_with_all_logits_and_a_run_may_change_over(tmp_path):
    whole = lines("null", tmp_path / "whole")
    lines("7", tmp_path / "blocks", **{"train.steps": "2", "optim.schedule_steps": "4"})
    blocks = lines("5", tmp_path / "blocks", **{"optim.schedule_steps": "4"})
    ours, theirs = (
        [numbers(line) for line in found if "loss" in line or "metric" in line] for found in (blocks, whole)
    )
    assert len(ours) == len(theirs) >= 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() and one
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, err_msg=name)


def test_a_block_without_positions_is_refused():
    with pytest.raises(SpecError, match="logits_block"):
        override(experiment(), {"model.logits_block": "0"})
