"""The log of examples: those of the trained steps, none of the batches fetched ahead, the same after a crash."""

import json

import pytest
from tiny_experiment import experiment

from polygpt.overrides import override
from polygpt.training.example_log import ExampleLog
from polygpt.training.loggers import Silent
from polygpt.training.loop import train

pytestmark = pytest.mark.usefixtures("compiled_once")

OPTIONS = {
    "train.steps": "7",
    "train.evaluate_every": "null",
    "train.checkpoint.every": "3",
    "train.prefetch": "3",
    "model.decoder.depth": "0",
    "optim.accumulate": "1",
    "optim.ema": "null",
    "data.log_examples": "true",
}


class Failing(Silent):
    def step(self, step, loss):
        if step == 5:
            raise OSError("the machine is gone")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_names_its_examples_and_a_run_that_was_cut_off_names_the_same(tmp_path):
    chosen = override(experiment(), OPTIONS)
    train(chosen, tmp_path / "whole", lambda *_: [])
    (path,) = (tmp_path / "whole").glob("examples-*")
    assert path.name == "examples-0.jsonl"
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6, 7], "nothing of what was fetched ahead"
    seen = [(task, position) for line in lines(path) for task, position, _ in line["examples"]]
    assert len(set(seen)) == len(seen) >= 7 * chosen.data.batch_size
    assert {task for task, _ in seen} <= set(chosen.data.tasks)

    with pytest.raises(OSError, match="the machine is gone"):
        train(chosen, tmp_path / "cut", lambda *_: [Failing()])
    assert lines(tmp_path / "cut" / "examples-0.jsonl")[-1]["step"] == 5
    train(chosen, tmp_path / "cut", lambda *_: [])
    assert (tmp_path / "cut" / "examples-0.jsonl").read_bytes() == path.read_bytes()


def test_a_run_that_goes_on_may_begin_to_log(tmp_path):
    chosen = override(experiment(), OPTIONS | {"data.log_examples": "false", "train.steps": "2"})
    train(chosen, tmp_path, lambda *_: [])
    assert not list(tmp_path.glob("examples-*"))
    train(override(chosen, {"data.log_examples": "true", "train.steps": "4"}), tmp_path, lambda *_: [])
    assert [line["step"] for line in lines(tmp_path / "examples-0.jsonl")] == [3, 4]


def test_files_of_feeders_that_are_no_more_are_cut_too(tmp_path):
    for data_shard in range(4):
        log = ExampleLog(tmp_path, data_shard, 4, 0)
        for step in (1, 2, 3, 4):
            log.examples(step, (("a", 4 * step + data_shard, 0),))
        log.close()
    for data_shard in range(2):
        log = ExampleLog(tmp_path, data_shard, 2, 3)
        log.examples(4, (("a", 50 + data_shard, 0),))
        log.rewind(3, spike=4)
        log.examples(4, (("a", 60 + data_shard, 0),))
        log.close()
    found = {n: lines(tmp_path / f"examples-{n}.jsonl") for n in range(4)}
    assert {n: [line["step"] for line in some] for n, some in found.items()} == {
        0: [1, 2, 3, 4],
        1: [1, 2, 3, 4],
        2: [1, 2, 3],
        3: [1, 2, 3],
    }
    assert found[1][-1] == {"step": 4, "examples": [["a", 61, 0]]}
