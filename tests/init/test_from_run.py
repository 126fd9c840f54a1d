"""A run that starts from another: its parameters to the bit, and what cannot be started from."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_experiment import experiment

from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import UserError
from polygpt.heads.linear import LinearHead
from polygpt.init.from_run import FromRun
from polygpt.models.functional import bind
from polygpt.overrides import override
from polygpt.parameters import paths
from polygpt.runtime import processes
from polygpt.runtime.stored import read_parameters
from polygpt.training.loggers import JsonLines, Silent
from polygpt.training.loop import train
from polygpt.training.program import assemble
from polygpt.training.run import open_run

SMALL = {
    "model.decoder.depth": "0",
    "optim.accumulate": "1",
    "train.steps": "4",
    "train.evaluate_every": "2",
    "train.checkpoint.every": "2",
    "evaluation.tasks.text.limit": "2",
}


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4 and a moving average."""
    workdir = tmp_path_factory.mktemp("former") / "run"
    train(override(experiment(), SMALL), workdir, lambda *_: [Silent()])
    return workdir


def following(path, **fields):
    return override(experiment(), SMALL).replace(init=FromRun(path=str(path), **fields))


def first_state(chosen):
    return assemble(chosen, chosen.tokenizer.build().vocabulary).first_state()


def equal(found, expected):
    assert found.keys() == expected.keys()
    return all(np.array_equal(found[name], expected[name]) for name in found)


def test_parameters_and_average_are_those_of_the_chosen_checkpoint(former):
    states = {use: first_state(following(former, checkpoint=use)) for use in (2, "latest")}
    for use, state in states.items():
        step = {2: 2, "latest": 4}[use]
        expected = paths(stored_parameters(former, step))
        assert equal(paths(state.params), expected) and equal(paths(state.ema), expected)
        assert int(state.step) == 0
    assert not equal(paths(states[2].params), paths(states["latest"].params))
    assert equal(paths(first_state(following(former)).params), paths(open_run(former).params)), "the run's train.use"


def stored_parameters(run, step):
    model = bind(following(run).model, Bytes().build().vocabulary)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.abstract())
    return read_parameters(run / "checkpoints", step, target, averaged=True)


def test_all_processes_read_the_checkpoint_that_the_first_one_chose(former, monkeypatch):
    monkeypatch.setattr(processes, "broadcast", lambda name, text: "2")
    assert following(former, checkpoint="latest").init.open().place.name == "2"


def test_excluded_parameters_are_those_of_the_seed(former):
    state = first_state(following(former, exclude="^text/"))
    random = first_state(override(experiment(), SMALL))
    theirs = open_run(former).params
    for name, value in paths(state.params).items():
        expected = random.params if name.startswith("text/") else theirs
        np.testing.assert_array_equal(value, paths(expected)[name], err_msg=name)


def test_a_run_says_what_it_started_from_and_needs_it_no_more_once_it_has_a_checkpoint(former, tmp_path, capsys):
    source = shutil.copytree(former, tmp_path / "former")
    workdir, chosen = tmp_path / "run", following(source, exclude="^head/", strict=False)
    train(override(chosen, {"train.steps": "2"}), workdir, lambda *where: [JsonLines(*where[:2])])
    said = capsys.readouterr().err
    assert "text of" in said and (workdir / "init.txt").read_text() in said
    shutil.rmtree(source)
    assert train(chosen, workdir, lambda *where: [JsonLines(*where[:2])]).step == 4
    assert "text of" not in capsys.readouterr().err


def harmed(run):
    path = next(iter(sorted((run / "checkpoints/4/ema").rglob("d/*"))))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def of_something_else(run):
    (run / "config.json").write_text(json.dumps({"class": "polygpt.data.layout:LayoutSpec", "seq_len": 4}))


CANNOT = {
    "no folder": (shutil.rmtree, {}, ["not a run folder"]),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), {}, ["no complete checkpoint"]),
    "a flipped bit": (harmed, {"checkpoint": 4}, ["damaged", "init.checkpoint"]),
    "not a run": (of_something_else, {}, ["does not describe"]),
    "half a file": (lambda run: (run / "config.json").write_text("{"), {}, ["does not describe"]),
    "no such step": (lambda run: None, {"checkpoint": 3}, ["init.checkpoint is 3", "2, 4"]),
    "step 0": (lambda run: None, {"checkpoint": 0}, ["init.checkpoint is 0", "2, 4"]),
    "another width": (lambda run: None, {}, ["[16]", "[8]", "init.exclude"]),
    "another tokenizer": (lambda run: None, {}, ["another tokenizer", "init.exclude"]),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_started_from_is_one_line_and_leaves_nothing(what, former, tmp_path):
    harm, fields, words = CANNOT[what]
    source, workdir = shutil.copytree(former, tmp_path / "former"), tmp_path / "run"
    harm(source)
    chosen = following(source, **fields)
    if what == "another width":
        chosen = override(chosen, {"model.decoder.width": "8"})
    if what == "another tokenizer":
        chosen = chosen.replace(tokenizer=Bytes(multiple=256))
    with pytest.raises(UserError) as error:
        train(chosen, workdir, lambda *_: [Silent()])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and not workdir.exists()


def test_a_head_is_added_to_a_trained_model_by_excluding_it(former):
    heads = {"own": LinearHead(3)}
    chosen = following(former)
    chosen = chosen.replace(model=chosen.model.replace(heads=heads))
    with pytest.raises(
        UserError, match=r"nothing in .* fills heads/own/map/bias and 1 more: .*init.exclude '\^heads/own"
    ):
        first_state(chosen)
    chosen = chosen.replace(init=FromRun(path=str(former), exclude="^heads/own(/|$)"))
    found, program = paths(first_state(chosen).params), assemble(chosen, 258)
    own = paths(program.model.init(jax.random.key(chosen.seed)))
    trained = paths(first_state(following(former)).params)
    assert equal({name: value for name, value in found.items() if name in trained}, trained)
    assert found.keys() - trained.keys() == {"heads/own/map/kernel", "heads/own/map/bias"}
    assert found["heads/own/map/kernel"].shape == own["heads/own/map/kernel"].shape
    assert "heads/own" in program.start.table
