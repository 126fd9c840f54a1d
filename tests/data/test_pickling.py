"""Pickling classes of a user's own file for workers."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task, train_batches
from polygpt.data.mixture import Order
from polygpt.data.pickling import dumps
from polygpt.spec import load_class, load_file

MINE = """
import dataclasses
from polygpt.data.example import Example, Text
from polygpt.data.sources.base import Source

def number(i):
    return Example((Text(f"answer {i}"),), f"number {i}")

class Numbers:
    class Inner:
        pass
    def __init__(self, make):
        self.make = make
    def __len__(self):
        return 9
    def __getitem__(self, i):
        return self.make(i)

@dataclasses.dataclass(frozen=True)
class Mine(Source):
    def open(self):
        return Numbers(number)
"""


@pytest.fixture
def mine(tmp_path):
    """A file of a user's own, loaded."""
    file = tmp_path / "my.source.py"
    file.write_text(MINE)
    return load_file(file)


def test_classes_of_a_users_file_travel_to_a_process_that_has_not_loaded_it(mine, tmp_path):
    value = [mine.Mine(), mine.Mine().open(), mine.Numbers.Inner, lambda: mine.__name__, Order]
    (tmp_path / "pickled").write_bytes(dumps(value[:3]))
    code = "import pickle, sys; s, e, c = pickle.load(open(sys.argv[1], 'rb')); print(s, len(e), e[3].answer, c)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "pickled"], capture_output=True, text=True)
    inner = f"<class '{mine.__name__}.Numbers.Inner'>"
    assert done.stdout.strip() == f"Mine() 9 answer 3 {inner}", done.stderr
    source, examples, cls, local, order = pickle.loads(dumps(value))
    assert (source, type(examples), cls, order) == (mine.Mine(), mine.Numbers, mine.Numbers.Inner, Order)
    assert local() == mine.__name__


@pytest.mark.slow
def test_workers_read_a_source_of_a_users_file(small, mine):
    source = load_class(f"{mine.__name__}:Mine")()
    data = DataSpec({"mine": Task(source)}, LayoutSpec(seq_len=64), batch_size=4)
    here = train_batches(data, small.tokenizer, {}, seed=0)
    workers = train_batches(data.replace(workers=1), small.tokenizer, {}, seed=0)
    for _ in range(3):
        np.testing.assert_array_equal(next(workers).tokens_BT, next(here).tokens_BT)
    workers.close()
