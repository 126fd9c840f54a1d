"""What a person is told when a run is resumed."""

import json
import re

import pytest

from polygpt.training.resuming import lost


@pytest.mark.parametrize(("done", "words"), [(0, "steps 1 to 370 .* no checkpoint"), (300, "steps 301 to 370 .* 300")])
def test_steps_that_were_not_saved_are_told(tmp_path, done, words):
    lines = [{"from": 0, "step": 100, "seconds": {}}, {"from": 100, "step": 370, "seconds": {}}]
    (tmp_path / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (line,) = lost(tmp_path / "goodput.jsonl", done, 500)
    assert re.search(words, line) and "checkpoint.every 500" in line
    assert lost(tmp_path / "goodput.jsonl", 370, 500) == []
    assert lost(tmp_path / "none.jsonl", 0, 500) == []
