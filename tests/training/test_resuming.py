"""What a person is told when a run is resumed, or ends with steps that are not saved."""

import json
import re

import pytest

from polygpt.runtime.checkpoint import CheckpointSpec
from polygpt.training.resuming import diverged, lost_steps, unsaved_steps

SPEC = CheckpointSpec(every=500, every_minutes=2.5)


@pytest.mark.parametrize(
    ("done", "words"), [(0, r"370 steps \(1 to 370\) lost.*no checkpoint"), (300, r"70 steps \(301 to 370\).* 300")]
)
@pytest.mark.parametrize("name", ["goodput.jsonl", "metrics.jsonl"])
def test_steps_that_were_not_saved_are_told(tmp_path, done, words, name):
    lines = [{"from": 0, "step": 100, "seconds": {}}, {"from": 100, "step": 370, "seconds": {}}]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    (line,) = lost_steps(tmp_path, done, SPEC)
    assert re.search(words, line) and "checkpoint.every 500, every_minutes 2.5" in line
    assert lost_steps(tmp_path, 370, SPEC) == []
    assert lost_steps(tmp_path / "none", 0, SPEC) == []


def test_a_step_that_a_rewind_is_to_take_again_is_not_lost(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n{"step": 51, "rewound_from": 57}\n')
    assert lost_steps(tmp_path, 50, SPEC) == []


def test_a_process_that_ends_says_what_it_has_not_saved():
    assert unsaved_steps(370, 370) == []
    assert re.search(r"1 step \(370 to 370\) not saved.*resumes at step 369", *unsaved_steps(369, 370))
    assert re.search(r"370 steps \(1 to 370\) not saved.*starts over", *unsaved_steps(0, 370))


def test_what_was_not_finite_is_named_with_a_remedy_that_fits():
    metrics = {"loss": 2.0, "gradient_norm": float("nan"), "update_norm": [float("inf"), 1.0], "skipped_in_row": 10}
    later = diverged(40, metrics, 10, [20, 30])
    assert "step 40: the gradient, the update not finite" in later and "checkpoint of step 30" in later
    assert "learning rate" in later and "loss" not in later.split(";")[0]
    first = diverged(10, metrics, 10, [])
    assert "no checkpoint" in first and "attention check" in first and "learning rate" not in first
