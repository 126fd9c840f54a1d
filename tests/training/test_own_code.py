"""A run keeps the code of the user's classes: editing, moving or deleting their file changes nothing for it."""

import json
import shutil
import sys

import pytest
from tiny_experiment import TEXT

from polygpt.ablation.compare import compare_runs
from polygpt.errors import SpecError
from polygpt.spec import load_file, to_json
from polygpt.training.loggers import JsonLines
from polygpt.training.loop import train
from polygpt.training.run import open_run
from polygpt.training.workdir import load_experiment

FILE = """
import dataclasses
import polygpt.api as pg
from polygpt.objectives.next_token import NextToken
from polygpt.data.layout import LayoutSpec
from polygpt.spec import from_json
import {helper}

@dataclasses.dataclass(frozen=True)
class Mine(NextToken):
    def total(self, outputs, batch):
        return super().total(outputs, batch) * {helper}.factor()

def experiment(steps=6, seed=0):
    data = pg.DataSpec({{"text": pg.Task(from_json({text!r}))}}, LayoutSpec(seq_len=64), 2)
    model = pg.ModelSpec(pg.DecoderSpec(width=8, depth=0, attention=pg.MultiHead(heads=1)))
    train = pg.TrainSpec(steps, log_every=1, checkpoint=pg.CheckpointSpec(every=3))
    optim = pg.Optim(pg.Constant(1e-2), clip=None, optimizer=pg.SGD())
    return pg.Experiment("own", data, optim, train, model, objectives={{"mine": (Mine(), 1.0)}}, seed=seed)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a user's files, on the path."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "own_objective.py").write_text(FILE.format(helper="own_factor", text=to_json(TEXT)))
    (folder / "own_factor.py").write_text("def factor():\n    return 1.0\n")
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))
    forget(folder)


def forget(folder):
    for name in [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Where runs of 6 and of 3 steps are."""
    experiment, place = load_file(folder / "own_objective.py").experiment, tmp_path_factory.mktemp("runs")
    for name, steps in (("whole", 6), ("half", 3)):
        train(experiment(steps), place / name, quiet)
    return place


@pytest.fixture
def run(folder, trained, tmp_path):
    """(the user's file, a run of 6 steps, the same of 3 steps); afterwards the files are as before."""
    before = {file: file.read_text() for file in folder.glob("*.py")}
    forget(folder)
    for name in ("whole", "half"):
        shutil.copytree(trained / name, tmp_path / name)
    yield folder / "own_objective.py", tmp_path / "whole", tmp_path / "half"
    for file, text in before.items():
        file.write_text(text)
    forget(folder)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def quiet(workdir, step, steps):
    return [JsonLines(workdir, step)]


def edit(file):
    (file.parent / "own_factor.py").write_text("def factor():\n    return 1.5\n")


def test_a_run_that_is_resumed_keeps_its_code_unless_told(run, caplog):
    file, whole, half = run
    edit(file)
    train(load_file(file).experiment(), half, quiet)
    assert losses(half) == losses(whole)
    named = [record.getMessage() for record in caplog.records if "changed" in record.getMessage()]
    assert len(named) == 1 and str(file.parent / "own_factor.py") in named[0] and "--code current" in named[0]


def test_a_run_may_be_resumed_with_the_code_as_it_is(run):
    file, whole, half = run
    edit(file)
    train(load_file(file).experiment(), half, quiet, code="current")
    expected, got = losses(whole), losses(half)
    assert [got[step] for step in (1, 2, 3)] == [expected[step] for step in (1, 2, 3)]
    assert got[4] == pytest.approx(1.5 * expected[4], rel=1e-5), "the loss of the same parameters, by the edited code"
    kept = [(half / name).rglob("own_factor.py") for name in ("code", "code-until-3")]
    assert ["1.5" in next(files).read_text() for files in kept] == [True, False]
    forget(file.parent)
    factor = sys.modules[type(load_experiment(half).objectives["mine"][0]).__module__].own_factor.factor
    assert factor() == 1.5, "from now on that is the run's code"


def test_a_run_opens_though_its_file_is_edited_or_gone(run, tmp_path):
    file, whole, _ = run
    edit(file)

    def factor(code):
        opened = open_run(whole, code=code).experiment
        return sys.modules[type(opened.objectives["mine"][0]).__module__].own_factor.factor()

    assert (factor("run"), factor("current")) == (1.0, 1.5)
    forget(file.parent)
    file.rename(tmp_path / "moved.py")
    assert factor("run") == 1.0
    with pytest.raises(SpecError, match="no longer exists: omit --code current"):
        open_run(whole, code="current")


def test_a_folder_without_a_checkpoint_takes_the_code_as_it_is(run, tmp_path):
    file, whole, half = run
    for place in (half / "checkpoints").iterdir():
        place.rename(tmp_path / place.name)
    edit(file)
    train(load_file(file).experiment(), half, quiet)
    assert losses(half)[1] == pytest.approx(1.5 * losses(whole)[1], rel=1e-5)


def test_runs_of_different_code_are_compared_as_such(run, tmp_path):
    file, whole, _ = run
    file.write_text(file.read_text().replace("batch) * own", "batch) * 2 * own"))
    train(load_file(file).experiment(), tmp_path / "other", quiet)
    found = compare_runs([whole, tmp_path / "other"])
    assert len(found.groups) == 2 and list(found.differences) == ["code.own_objective"]
