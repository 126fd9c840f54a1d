"""Real processes: a run that goes on with another number of them has every example once."""

from pathlib import Path

import pytest

from example_ids import assert_once_an_epoch, logged
from polygpt.scale.launch import local
from polygpt.spec import load_file

FILE = Path(__file__).parents[1] / "training" / "tiny_experiment.py"
CHANGES = {
    "train.parallel": "sharded",
    "train.evaluate_every": "null",
    "train.prefetch": "3",
    "model.decoder.depth": "0",
    "optim.accumulate": "1",
    "optim.ema": "null",
    "data.batch_size": "12",
    "data.log_examples": "true",
}


def goes_on(workdir: Path, processes: int, steps: int) -> None:
    changes = [word for name, value in CHANGES.items() for word in (f"--{name}", value)]
    command = ["train", str(FILE), "--workdir", str(workdir), "--train.steps", str(steps), *changes]
    outcome = local.run(command, processes, 1, workdir.with_name("logs"))
    assert outcome.exit_codes == (0,) * processes, outcome.cause


@pytest.mark.slow
def test_no_example_is_lost_or_repeated_when_the_number_of_processes_changes(tmp_path):
    size = len(load_file(FILE).TEXT.open())
    for processes, steps in ((3, 3), (2, 6), (1, 9 + size // 12)):
        goes_on(tmp_path / "run", processes, steps)
        assert len(logged(tmp_path / "run")) == steps
    assert_once_an_epoch(logged(tmp_path / "run"), {"text": size})
    assert len(list((tmp_path / "run").glob("examples-*.jsonl"))) == 3
