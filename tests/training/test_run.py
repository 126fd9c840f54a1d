"""Opening a run: a checkpoint that is damaged is named, and the newest good one takes its place."""

import shutil

import jax
import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.errors import UserError
from polygpt.overrides import override
from polygpt.runtime.checkpoint import listed
from polygpt.training.loggers import Silent
from polygpt.training.loop import train
from polygpt.training.run import open_run

SMALL = {"model.decoder.depth": "0", "optim.accumulate": "1", "train.steps": "6", "train.evaluate_every": "null"}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run with checkpoints of steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("three")
    chosen = override(experiment(), SMALL | {"train.checkpoint.every": "2", "train.checkpoint.keep": "3"})
    train(chosen, workdir, lambda *_: [Silent()])
    return workdir


@pytest.fixture
def run(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


def flip(run, step, item):
    path = next(path for path in sorted((run / "checkpoints" / str(step) / item).rglob("d/*")))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    return path.relative_to(run)


def test_a_flipped_bit_is_named_and_the_newest_good_one_is_opened(run, caplog):
    assert open_run(run).step == 6 and not caplog.text
    path = flip(run, 6, "ema")
    (run / "checkpoints/4/manifest.json").unlink()
    opened = open_run(run)
    assert opened.step == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(opened.params))
    step, _, name = str(path).removeprefix("checkpoints/").partition("/")
    assert f"checkpoints/{step}: {name} is not as it was written" in caplog.text
    assert "checkpoints/4: incomplete, without manifest.json" in caplog.text


def test_what_is_not_read_need_not_be_as_it_was_written_but_whole(run):
    path = run / flip(run, 6, "optimizer")
    assert open_run(run).step == 6
    path.unlink()
    assert open_run(run).step == 4


def test_opening_changes_nothing_on_disk(run):
    flip(run, 6, "ema")
    before = sorted(run.rglob("*"))
    open_run(run)
    assert sorted(run.rglob("*")) == before


def test_where_none_is_good_all_are_named_in_one_line(run):
    names = {step: flip(run, step, "ema").relative_to(f"checkpoints/{step}") for step in (6, 4)}
    (run / "checkpoints/2/ema/_METADATA").unlink()
    with pytest.raises(UserError) as error:
        open_run(run)
    tried = [f"{step}: {name} is not as it was written" for step, name in names.items()]
    tried += ["2: ema/_METADATA is missing"]
    said = f"no checkpoint in {run / 'checkpoints'} can be read ({'; '.join(tried)}): train the run again"
    assert str(error.value) == f"{said}, or open another"


def test_a_fault_that_several_checkpoints_share_is_said_once():
    faults = {6: "a is missing", 4: "b is missing", 2: "a is missing"}
    assert listed(faults) == "6, 2: a is missing; 4: b is missing"
