"""Runs whose objectives read models that are not trained: teachers and the run's own initial parameters."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import SpecError, UserError
from polygpt.init.from_run import FromRun
from polygpt.init.reference import Reference
from polygpt.nn.positions import Learned
from polygpt.objectives.base import Objective
from polygpt.objectives.distillation import Distillation
from polygpt.objectives.hidden_distillation import HiddenDistillation
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.preference import PreferenceObjective
from polygpt.overrides import override
from polygpt.parameters import paths
from polygpt.spec import from_json, to_json
from polygpt.training.loggers import JsonLines, Silent
from polygpt.training.loop import train
from polygpt.training.program import assemble
from polygpt.training.run import open_run

SMALL = {"model.decoder.depth": "0", "optim.accumulate": "1", "train.steps": "4", "train.evaluate_every": "null"}
SMALL |= {"train.checkpoint.every": "2", "train.parallel": "single"}


@dataclasses.dataclass(frozen=True)
class Toward(Objective):
    """Squared distance of the logits to those of another model."""

    name: str = "teacher"
    """The other model."""

    @property
    def others(self):
        return (self.name,)

    def total(self, outputs, batch):
        distance_BT = jnp.mean(jnp.square(outputs.logits_BTV - outputs.other(self.name).logits_BTV), axis=-1)
        return jnp.sum(batch.weight_BT * distance_BT)


class Prefers(PreferenceObjective):
    """A preference objective of single answers."""

    @property
    def others(self):
        return ("teacher",)

    def check_with(self, model, layout):
        pass


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished run of a wider model."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    train(override(experiment(), SMALL | {"model.decoder.width": "32"}), workdir, lambda *_: [Silent()])
    return workdir


def student(teacher, **changes):
    objectives = {"next": (NextToken(), 1.0), "teacher": (Toward(), 2.0), "start": (Toward("start"), 0.5)}
    references = {"teacher": Reference(FromRun(path=str(teacher))), "start": Reference()}
    chosen = override(experiment(), SMALL).replace(objectives=objectives, references=references)
    return chosen.replace(**changes)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def json_lines(workdir, step, steps):
    return [JsonLines(workdir, step)]


def test_references_keep_their_parameters_and_a_run_resumes_to_the_bit(teacher, tmp_path):
    chosen = student(teacher)
    assert from_json(json.loads(json.dumps(to_json(chosen)))) == chosen
    train(chosen, tmp_path / "whole", json_lines)
    train(chosen.replace(train=chosen.train.replace(steps=2)), tmp_path / "halves", json_lines)
    train(chosen, tmp_path / "halves", json_lines)
    whole, halves = lines(tmp_path / "whole"), lines(tmp_path / "halves")
    assert halves[-1] == whole[-1] and whole[-1]["loss/start"] > 0
    items = {path.name for path in (tmp_path / "whole/checkpoints/4").iterdir()}
    assert not any("reference" in name or "teacher" in name for name in items)


def test_the_state_has_the_teacher_s_parameters_and_a_copy_of_the_first(teacher):
    program = assemble(student(teacher), 258)
    state = program.first_state()
    theirs = open_run(teacher)
    assert {"teacher", "start"} == state.references.keys()
    for name, value in paths(state.references["teacher"]).items():
        np.testing.assert_array_equal(value, paths(theirs.params)[name])
    jax.tree.map(np.testing.assert_array_equal, state.references["start"], state.params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(pointers) == len(set(pointers)), "a donated buffer must not be shared"


def test_a_reference_that_changed_is_told_when_a_run_resumes(teacher, tmp_path):
    source = shutil.copytree(teacher, tmp_path / "teacher")
    chosen = override(student(source), {"train.parallel": "auto"})
    train(chosen.replace(train=chosen.train.replace(steps=2)), tmp_path / "run", json_lines)
    shutil.rmtree(source / "checkpoints/4")
    with pytest.raises(UserError, match=r"references\.teacher was .*step 4 and is now .*step 2: .*init\.checkpoint"):
        train(chosen, tmp_path / "run", json_lines)
    assert len(lines(tmp_path / "run")) == 1
    shutil.rmtree(source)
    assert open_run(tmp_path / "run", spread=True).step == 2, "a trained model needs no references"


def test_a_source_of_initial_parameters_that_changed_is_told_when_a_run_resumes(teacher, tmp_path):
    source = shutil.copytree(teacher, tmp_path / "source")
    chosen = override(experiment(), SMALL | {"model.decoder.width": "32"}).replace(
        objectives={"start": (Toward("start"), 1.0)},
        references={"start": Reference()},
        init=FromRun(path=str(source)),
    )
    train(chosen.replace(train=chosen.train.replace(steps=2)), tmp_path / "run", json_lines)
    shutil.rmtree(source / "checkpoints/4")
    words = r"references\.start was the initial parameters \(.*step 4\) and is now .*step 2\): .*\(init\.checkpoint\)"
    with pytest.raises(UserError, match=words):
        train(chosen, tmp_path / "run", json_lines)


def test_several_seeds_start_from_one_run(teacher):
    chosen = override(experiment(), SMALL | {"model.decoder.width": "32"}).replace(init=FromRun(path=str(teacher)))
    alone, states = (assemble(chosen, 258, seeds=seeds).first_state() for seeds in ((), (0, 1)))
    jax.tree.map(lambda one, two: np.testing.assert_array_equal(two, np.stack([one, one])), alone.params, states.params)


def test_what_cannot_be_a_reference_is_one_line_and_leaves_nothing(teacher, tmp_path):
    with pytest.raises(SpecError, match=r"objectives\.teacher reads the model 'teacher': add it to references"):
        student(teacher, references={"start": Reference()})
    good = {"teacher": Reference(FromRun(path=str(teacher))), "start": Reference()}
    short = open_run(teacher).model.spec.decoder.replace(position=Learned(32))
    for references, words in (
        ({"more": Reference()}, r"references\.more is read by no objective"),
        ({"teacher": Reference(FromRun(path=str(tmp_path / "none")))}, r"references\.teacher: .*not a run folder"),
        (
            {"teacher": Reference(FromRun(path=str(teacher), exclude="^text/"))},
            r"references\.teacher: nothing in .* fills text/table",
        ),
        (
            {"teacher": Reference(FromRun(path=str(teacher)), open_run(teacher).model.spec.replace(decoder=short))},
            r"references\.teacher: LayoutSpec\.seq_len is 64: it must be at most 32, .* model\.decoder\.position",
        ),
    ):
        with pytest.raises(UserError, match=words):
            train(student(teacher, references=good | references), tmp_path / "run", json_lines)
    encoder = open_run(teacher).model.spec
    encoder = encoder.replace(decoder=encoder.decoder.replace(mask="bidirectional"))
    seeing = {"teacher": Reference(FromRun(path=str(teacher)), encoder)}
    words = (
        r"references\.teacher, which objectives\.soft reads: its model\.decoder\.mask is 'bidirectional', .*: name a"
    )
    for soft in (Distillation(), HiddenDistillation(), Prefers()):
        objectives = {"soft": (soft, 1.0), "start": (Toward("start"), 0.5)}
        with pytest.raises(UserError, match=words):
            train(student(teacher, references=good | seeing, objectives=objectives), tmp_path / "run", json_lines)
    for soft, words in (
        (HiddenDistillation(), r"reads: HiddenDistillation: the model's vectors have 16 .* of 'teacher' 32: set head"),
        (HiddenDistillation(layers=((0, 2),)), r"reads: HiddenDistillation\.layers: 'teacher' has no block 2"),
    ):
        objectives = {"soft": (soft, 1.0), "start": (Toward("start"), 0.5)}
        with pytest.raises(UserError, match=r"references\.teacher, which objectives\.soft " + words):
            deeper = override(student(teacher, references=good), {"model.decoder.depth": "1"})
            train(deeper.replace(objectives=objectives), tmp_path / "run", json_lines)
    remedy = r"references\.teacher: .*another tokenizer.* polygpt data score and read them with SpanDistillation"
    with pytest.raises(UserError, match=remedy):
        train(student(teacher, tokenizer=Bytes(multiple=64)), tmp_path / "run", json_lines)
    decoder = {"decoder": Reference()}
    with pytest.raises(UserError, match=r"references\.decoder: the name is taken"):
        train(
            student(teacher, objectives={"a": (Toward("decoder"), 1.0)}, references=decoder),
            tmp_path / "run",
            json_lines,
        )
    assert not (tmp_path / "run").exists()
