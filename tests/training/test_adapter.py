"""Adapters in files of their own: with their base they are the run that trained them, and nothing else is accepted."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.api import save_adapter
from polygpt.cli.main import main
from polygpt.data.transforms.fill_in_the_middle import FillInTheMiddle
from polygpt.errors import UserError
from polygpt.files import plain
from polygpt.init.from_run import FromRun
from polygpt.models.adapter_file import ABOUT, AdapterFile, checksums
from polygpt.models.low_rank import LowRank
from polygpt.models.prefix import PrefixTuning
from polygpt.overrides import override
from polygpt.parameters import paths
from polygpt.report.finish import evaluate_run
from polygpt.spec import to_json
from polygpt.training.loggers import Silent
from polygpt.training.loop import train
from polygpt.training.program import assemble
from polygpt.training.run import open_run

pytestmark = pytest.mark.usefixtures("compiled_once")

SMALL = {"optim.accumulate": "1", "train.steps": "2", "train.evaluate_every": "2", "train.use": "latest"}
ADAPTED = {
    "first": {"low_rank": LowRank("attention", rank=2, magnitude=True)},
    "second": {
        "low_rank": LowRank("mlp/", rank=3, rank_stabilized=True, also="norm/"),
        "prefix": PrefixTuning(length=2),
    },
    "third": {"prefix": PrefixTuning(length=4)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a base, two runs that start from it, one that starts from the first of these, and their files."""
    folder = tmp_path_factory.mktemp("runs")
    chosen = override(experiment(), SMALL | {"evaluation.tasks.text.limit": "3"})
    chosen = override(chosen, {"optim.schedule.peak_lr": "0.1", "optim.schedule.warmup": "1"})  # weights that differ
    train(chosen, folder / "base", lambda *_: [Silent()])
    for (name, added), start in zip(ADAPTED.items(), ("base", "base", "first"), strict=True):
        tuned = chosen.replace(model=chosen.model.replace(**added), init=FromRun(path=str(folder / start)))
        tuned = override(tuned, {"data.layout.prompt_span": "bidirectional"}) if name == "second" else tuned
        train(tuned, folder / name, lambda *_: [Silent()])
        save_adapter(folder / name, folder / f"{name}.npz")
    return folder


def command(capsys, *words):
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name, base", [("first", "base"), ("second", "base"), ("third", "first")])
def test_a_base_with_an_adapter_is_the_run_that_trained_it(runs, name, base):
    trained, opened = open_run(runs / name), open_run(runs / base, adapter=runs / f"{name}.npz")
    assert opened.model.spec == trained.model.spec and opened.adapter == runs / f"{name}.npz"
    assert opened.experiment.data.layout == trained.experiment.data.layout, "it reads prompts as it was trained to"
    expected, found = paths(trained.params), paths(opened.params)
    assert expected.keys() == found.keys()
    for parameter, value in expected.items():
        np.testing.assert_array_equal(found[parameter], value, err_msg=parameter)
    before = paths(open_run(runs / base).params)
    assert sum(name not in before or np.any(value != before[name]) for name, value in found.items()) >= 2


def test_generation_and_evaluation_choose_one_of_several(runs, capsys):
    said, losses = {}, {}
    for name in ("first", "second"):
        adapter = ("--adapter", runs / f"{name}.npz")
        prompt = ("--text", "Licen", "--max_tokens", "8", "--json")
        code, out, err = command(capsys, "generate", runs / "base", *adapter, *prompt)
        assert code == 0, err
        alone = json.loads(command(capsys, "generate", runs / name, *prompt)[1])
        assert json.loads(out) == alone
        code, out, err = command(capsys, "evaluate", runs / "base", *adapter, "--json")
        assert code == 0, err
        losses[name], said[name] = json.loads(out)["tasks"]["text"]["loss"], alone["text"]
        assert losses[name] == plain(evaluate_run(open_run(runs / name)))["tasks"]["text"]["loss"]
    assert losses["first"] != losses["second"]
    assert not (runs / "base" / "evaluation.json").exists(), "results with an adapter are not those of the run"
    without = evaluate_run(open_run(runs / "base"))["tasks"]["text"]["loss"]
    assert without not in losses.values() and (runs / "base" / "evaluation.json").exists()


def test_one_opened_base_takes_adapters_one_after_another(runs):
    base = open_run(runs / "base")
    before = jax.tree.map(np.array, base.params)
    found = [base.with_adapter(runs / f"{name}.npz") for name in ("first", "second", "first")]
    for again, once in zip(*(paths(found[i].params).values() for i in (0, 2)), strict=True):
        np.testing.assert_array_equal(again, once)
    jax.tree.map(np.testing.assert_array_equal, base.params, before)


def test_a_file_holds_what_was_trained_and_nothing_else(runs):
    found = AdapterFile.read(runs / "second.npz")
    assert (
        found.kind == "rsLoRA, rank 3; prefix, length 2" and AdapterFile.read(runs / "first.npz").kind == "DoRA, rank 2"
    )
    assert all(re.search("^low_rank/|norm/|/prefix/", name) for name in found.params)
    assert not found.params.keys() & found.base.keys() and any("norm/" in name for name in found.params)
    assert found.numbers == sum(array.size for array in found.params.values()) < found.frozen / 2


def test_the_list_says_what_fits(runs, capsys):
    files = [runs / f"{name}.npz" for name in ADAPTED]
    code, out, err = command(capsys, "adapter", "list", *files, "--base", runs / "base", "--json")
    assert code == 0, err
    rows = json.loads(out)["adapters"]
    assert [row["fits"] == "yes" for row in rows] == [True, True, False] and "weights of" in rows[2]["fits"]
    assert [row["kind"] for row in rows] == ["DoRA, rank 2", "rsLoRA, rank 3; prefix, length 2", "prefix, length 4"]
    code, out, _ = command(capsys, "adapter", "list", *files)
    assert code == 0 and "DoRA, rank 2" in out and "fits" not in out


def test_a_run_can_start_from_a_base_with_an_adapter(runs):
    expected = open_run(runs / "second")
    init = FromRun(path=str(runs / "base"), adapter=str(runs / "second.npz"))
    assert init.model() == expected.experiment.model
    chosen = override(experiment(), SMALL).replace(model=expected.model.spec, init=init)
    state = assemble(chosen, expected.tokenizer.vocabulary).first_state()
    for parameter, value in paths(expected.params).items():
        np.testing.assert_array_equal(paths(state.params)[parameter], value, err_msg=parameter)


def test_a_run_cannot_start_from_another_base(runs):
    init = FromRun(path=str(runs / "base"), adapter=str(runs / "third.npz"))
    chosen = override(experiment(), SMALL).replace(init=init)
    program = assemble(chosen.replace(model=init.model()), chosen.tokenizer.build().vocabulary)
    with pytest.raises(UserError, match="init.adapter: .*third.npz does not fit .*base, step 2: the weights of"):
        program.first_state()


def refused(capsys, *words):
    code, out, err = command(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def test_another_base_is_refused(runs, capsys):
    err = refused(capsys, "generate", runs / "base", "--adapter", runs / "third.npz", "--text", "a")
    assert "does not fit" in err and "the weights of decoder/blocks/attention/key/kernel differ" in err
    err = refused(capsys, "evaluate", runs / "first", "--adapter", runs / "second.npz")
    assert "name the run and the checkpoint that it started from" in err


@pytest.mark.parametrize("other", ["merged elsewhere", "merged from other matrices"])
def test_a_base_is_known_by_what_it_was_merged_from(runs, tmp_path, other):
    """Another mesh rounds a merge otherwise."""

    def change(about):
        merged = [one for one in about["base"].values() if one[2] is not None]
        assert len(merged) == 4, "those of attention"
        for one in merged:
            one[1] ^= 1
            one[2] ^= other == "merged from other matrices"

    file = runs / "third.npz"
    place = edited(file, tmp_path / "edited.npz", **{ABOUT: described(file, change)})
    if other == "merged elsewhere":
        open_run(runs / "first", adapter=place)
        FromRun(path=str(runs / "first"), adapter=str(place)).open().read(paths(on_one(runs / "third")))
        return
    with pytest.raises(UserError, match="the weights of decoder/blocks/attention/key/kernel differ, and those of 3"):
        open_run(runs / "first", adapter=place)


def on_one(folder):
    """Shapes of the parameters of a run on one device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), open_run(folder).params)


def test_an_adapter_may_lack_parts_of_its_base_and_infills_as_it_has_learned(runs, tmp_path):
    infill = to_json(FillInTheMiddle(0.5))
    file = runs / "third.npz"
    place = edited(file, tmp_path / "edited.npz", **{ABOUT: described(file, lambda about: about.update(infill=infill))})
    base = open_run(runs / "first")
    wider = dataclasses.replace(base, params=base.params | {"heads": {"kind": {"kernel": np.ones((16, 3))}}})
    found = wider.with_adapter(place)
    assert "heads" not in found.params and found.infilling == FillInTheMiddle(0.5)
    assert base.infilling is None and base.with_adapter(file).infilling is None


def edited(file, place, **changes):
    """A copy of a file with other entries."""
    with np.load(file) as archive:
        np.savez(place, **{name: archive[name] for name in archive.files} | changes)
    return place


def described(file, change):
    with np.load(file) as archive:
        about = json.loads(archive[ABOUT].tobytes())
    change(about)
    return np.frombuffer(json.dumps(about).encode(), np.uint8)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda about: about["base"].pop("text/table"), "damaged: text/table is missing, its specification says"),
        (lambda about: about["base"]["text/table"].__setitem__(0, [3, 16]), r"text/table is \[3, 16\]"),
        (lambda about: about.update(tokenizer={"class": "other"}), "another tokenizer"),
        (lambda about: about["model"]["low_rank"].update(rank=4), "damaged: low_rank/.*its specification says"),
        (lambda about: about["model"].update(depth=2), "ModelSpec has no field 'depth'"),
        (lambda about: about.update(schema=99), "update polygpt"),
    ],
)
def test_a_file_that_contradicts_the_base_or_itself_is_refused(runs, tmp_path, change, reason):
    file = runs / "first.npz"
    place = edited(file, tmp_path / "edited.npz", **{ABOUT: described(file, change)})
    with pytest.raises(UserError, match=reason) as found:
        open_run(runs / "base", adapter=place)
    assert "\n" not in str(found.value)


def test_a_damaged_or_foreign_file_is_refused(runs, tmp_path, capsys):
    whole = (runs / "first.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    np.savez(tmp_path / "arrays.npz", w=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", **{ABOUT: np.array({}, object)})
    contents = {"cut": whole[:-100], "flipped": bytes(flipped), "text": b"not an archive", "empty": b""}
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    for name in ("cut", "flipped", "text", "empty", "arrays", "pickled"):
        err = refused(capsys, "evaluate", runs / "base", "--adapter", tmp_path / f"{name}.npz")
        assert f"{name}.npz is damaged, or is not an adapter" in err
    assert "no adapter" in refused(capsys, "evaluate", runs / "base", "--adapter", tmp_path / "gone.npz")
    assert "cannot be read" in refused(capsys, "adapter", "list", tmp_path)


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(runs, tmp_path, capsys):
    assert "trained all parameters" in refused(capsys, "adapter", "save", runs / "base", tmp_path / "new.npz")
    before = (runs / "first.npz").read_bytes()
    assert "exists already" in refused(capsys, "adapter", "save", runs / "second", runs / "first.npz")
    assert "is not a run folder" in refused(capsys, "adapter", "save", tmp_path, tmp_path / "new.npz")
    assert "cannot be written" in refused(capsys, "adapter", "save", runs / "first", runs / "first.npz" / "new.npz")
    assert (runs / "first.npz").read_bytes() == before and not list(tmp_path.iterdir())


def test_the_verb_writes_what_the_function_writes(runs, tmp_path, capsys):
    code, out, err = command(capsys, "adapter", "save", runs / "first", tmp_path / "new" / "first.npz", "--json")
    assert code == 0, err
    again, before = AdapterFile.read(tmp_path / "new" / "first.npz"), AdapterFile.read(runs / "first.npz")
    assert json.loads(out)["trained"] == again.numbers and again.base == before.base
    assert (tmp_path / "new" / "first.npz").read_bytes() == (runs / "first.npz").read_bytes()
    shutil.rmtree(tmp_path / "new")


def test_checksums_see_values_and_their_order():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = [x, x[::-1], x.T.reshape(2, 3), -x, x + np.float32(1e-6), x.astype(np.int32)]
    assert len({checksums({"x": array})["x"] for array in arrays}) == 6
    assert checksums({"x": x}) == checksums({"x": x.copy()})
