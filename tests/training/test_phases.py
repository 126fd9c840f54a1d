"""Runs in phases: the same to the bit wherever they are cut, and what a phase may not change."""

import contextlib
import json

import numpy as np
import pytest
from test_rewind import Cut, quiet
from tiny_experiment import TEXT, experiment

from batches import ADAPTERS
from polygpt.ablation.budget import Budget, costs
from polygpt.attention.sliding import SlidingWindow
from polygpt.data.loader import Task
from polygpt.errors import SpecError, UserError
from polygpt.evaluation.spec import EvalTask
from polygpt.init.from_run import FromRun
from polygpt.init.reference import Reference
from polygpt.nn.positions import NoPosition, Rope2D
from polygpt.objectives.parameter_penalty import ParameterPenalty
from polygpt.optim.groups import Group
from polygpt.optim.optimizers import SGD
from polygpt.overrides import override, replaced
from polygpt.parameters import paths
from polygpt.spec import from_json, to_json
from polygpt.training.loggers import Silent
from polygpt.training.loop import train
from polygpt.training.phase import Phase, expanded, steps_of
from polygpt.training.phases import Phases
from polygpt.training.run import open_run

pytestmark = pytest.mark.usefixtures("compiled_once")
SHORT = TEXT.replace(bytes=20)
STEPS, FIRST, SECOND = 10, 4, 7


def base(**changes):
    found = replaced(
        experiment(),
        {
            "data.tasks": {"text": Task(TEXT), "short": Task(SHORT, weight=2.0)},
            "evaluation.tasks": {"text": EvalTask(TEXT, limit=2, seq_len=64)},
            "optim.accumulate": 1,
            "model.decoder.depth": 2,
            "model.decoder.width": 8,
            "train.steps": STEPS,
            "train.log_every": 1,
            "train.evaluate_every": 2,
            "train.checkpoint.every": 3,
            "train.parallel": "single",
        },
    )
    return replaced(found, changes)


def in_phases(*phases, **changes):
    return base(**{"train.phases": tuple(Phase(start, given) for start, given in phases), **changes})


FROZEN = {"optim.groups": (Group("^decoder/blocks", layers=(0, 1), freeze=True), Group("^text", learning_rate=0.5))}
CHANGING = (
    (FIRST, {"data.layout.seq_len": 96, "data.batch_size": 2, "model.decoder.dropout": 0.0, "optim.groups": ()}),
    (
        SECOND,
        {
            "data.tasks.short.weight": 0.5,
            "model.decoder.attention": SlidingWindow(heads=2, window=8),
            "optim.schedule.peak_lr": 1e-3,
            "optim.groups": (Group("norm", freeze=True),),
            "objectives.next_token": (experiment().objectives["next_token"][0], 0.5),
        },
    ),
)


def changing(**changes):
    return in_phases(*CHANGING, **FROZEN, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is never cut."""
    workdir = tmp_path_factory.mktemp("whole")
    messages = []
    train(changing(), workdir, quiet, on_message=messages.append)
    return workdir, "\n".join(messages)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same(workdir, other):
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    ours, others = paths(open_run(workdir, "latest").params), paths(open_run(other, "latest").params)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


def test_what_the_phases_change_is_printed_and_takes_effect(whole):
    workdir, said = whole
    assert (
        "after step 4: data.layout.seq_len 64 -> 96, data.batch_size 4 -> 2, model.decoder.dropout 0.1 -> 0.0" in said
    )
    assert said.count("optim.groups\ngroup ") == 2, "with the groups of the phase"
    assert "after step 7: data.tasks.short.weight 2.0 -> 0.5" in said
    trained = [line for line in lines(workdir) if "loss" in line]
    rates = [line["learning_rate"] for line in trained]
    assert len(trained) == STEPS and rates[SECOND] < 0.5 * rates[SECOND - 1]
    assert trained[SECOND]["loss"] == pytest.approx(0.5 * trained[SECOND]["loss/next_token"], rel=1e-6)
    run = open_run(workdir, "latest")
    assert run.model.spec.decoder.attention == SlidingWindow(heads=2, window=8)
    assert run.experiment.data.layout.seq_len == 96
    assert FromRun(path=str(workdir), checkpoint="latest").model() == run.model.spec


@pytest.mark.parametrize(
    "how, steps",
    [
        ("stopped", [FIRST, SECOND]),
        ("killed", [SECOND + 1]),
        pytest.param("killed", [FIRST - 1], marks=pytest.mark.slow),
        pytest.param("stopped", [FIRST + 1], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_cut_near_a_phase_repeats_itself_to_the_bit(tmp_path, whole, how, steps):
    for at in steps:
        cut = Cut(at, how)
        with pytest.raises(InterruptedError) if how == "killed" else contextlib.nullcontext():
            assert not train(changing(), tmp_path, lambda *where, cut=cut: [*quiet(*where), cut]).finished
    assert train(changing(), tmp_path, quiet).finished
    assert_same(tmp_path, whole[0])


def test_a_phase_that_changes_nothing_changes_nothing(tmp_path):
    train(base(), tmp_path / "without", quiet)
    train(in_phases((FIRST, {"data.batch_size": 4})), tmp_path / "with", quiet)
    assert_same(tmp_path / "with", tmp_path / "without")


def test_a_resumed_run_takes_phases_that_have_not_begun_and_keeps_those_that_have(tmp_path, whole):
    before, after = CHANGING
    train(in_phases(before, **FROZEN), tmp_path, lambda *where: [*quiet(*where), Cut(SECOND - 1, "stopped")])
    with pytest.raises(UserError, match=r"different configuration: train\.phases"):
        train(in_phases((FIRST, {"data.batch_size": 2}), after, **FROZEN), tmp_path, quiet)
    assert train(changing(), tmp_path, quiet).finished
    assert_same(tmp_path, whole[0])


def test_a_reference_may_be_read_in_a_later_phase_only(tmp_path):
    objectives = {
        "next_token": experiment().objectives["next_token"],
        "start": (ParameterPenalty("kernel", toward="start"), 1.0),
    }
    chosen = in_phases((FIRST, {"objectives": objectives}), references={"start": Reference()})
    train(chosen, tmp_path, quiet)
    assert ["loss/start" in line for line in lines(tmp_path) if "loss" in line] == [False] * FIRST + [True] * 6


KEPT = "phases keep the names and shapes of all parameters; to grow a model"
REFUSED = {
    "a field that is not there": ({"data.layout.sequence": 8}, "data.layout.sequence: LayoutSpec has no field"),
    "a value": ({"data.batch_size": 0}, "DataSpec.batch_size is 0: it must be positive"),
    "a type": ({"model.decoder.dropout": "high"}, "model.decoder.dropout is 'high': it must be float"),
    "the number of steps": ({"train.steps": 9}, "changes train.steps: phases may change fields of data, model, optim"),
    "checkpoints": ({"train.checkpoint.every": 9}, "changes train.checkpoint.every: phases may change"),
    "the seed": ({"seed": 9}, "changes seed: phases may change"),
    "a source": ({"data.tasks.text": Task(SHORT)}, "changes data.tasks.text.source.bytes: all phases have the same"),
    "a task": ({"data.tasks.new": Task(SHORT)}, "changes data.tasks.new: all phases have the same tasks"),
    "an average": ({"optim.ema": None}, "changes optim.ema: an average cannot begin or end"),
    "an optimizer": ({"optim.optimizer": SGD()}, "changes optim.optimizer: no other optimizer can use the moments"),
    "a held-out length": (
        {"data.layout.seq_len": 96},
        "changes data.layout.seq_len, and with it what the held-out task 'open' measures: set "
        "evaluation.tasks.open.seq_len, such as to 96",
    ),
    "a shape": ({"model.decoder.mlp.factor": 2.0}, f"the parameter decoder/blocks/mlp/down/kernel is .*: {KEPT}"),
    "depth": ({"model.decoder.depth": 3}, rf"the parameter decoder/blocks/.* is \[2, .* and \[3, .*: {KEPT}"),
    "a group": ({"optim.groups": (Group("none"),)}, "optim.groups: the group 'none' takes no parameter"),
    "rows that do not divide": ({"optim.accumulate": 3}, "data.batch_size is 4: it must be a multiple of 3"),
    "scores": ({"data.scores": {"teacher": "/none"}}, "data.scores.teacher: /none has no scores"),
    "moments": ({"optim.optimizer.momentum": 0.9}, r"optim.optimizer: .* has no .*trace of .*: keep the optimizer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_phase_may_not_change_is_one_line_and_nothing_is_written(tmp_path, what):
    changes, said = REFUSED[what]
    more = {"evaluation.tasks.open": EvalTask(TEXT)} if what == "a held-out length" else {}
    more |= {"optim.optimizer": SGD(momentum=0.0)} if what == "moments" else {}
    with pytest.raises(UserError, match=rf"^train\.phases\.1 \(after step 7\):? {said}") as error:
        chosen = in_phases((FIRST, {"model.decoder.dropout": 0.2}), (SECOND, changes), **more)
        train(chosen, tmp_path / "run", quiet, on_message=lambda text: None)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_phases_are_in_order_and_survive_json():
    with pytest.raises(SpecError, match="TrainSpec.phases is .*: it must be in the order of their starts"):
        in_phases((SECOND, {"data.batch_size": 2}), (FIRST, {"data.batch_size": 1}))
    chosen = changing()
    assert from_json(json.loads(json.dumps(to_json(chosen)))) == chosen
    assert [one.data.batch_size for one in expanded(chosen)] == [4, 2, 2]
    assert steps_of(chosen) == [4, 3, 3] and steps_of(override(chosen, {"train.steps": "5"})) == [4, 1, 0]
    positions = (4 * 4 * 64 + 3 * 2 * 96 + 3 * 2 * 96) / STEPS
    assert costs(chosen).positions == round(positions)
    with pytest.raises(SpecError, match="budget.by is 'flops': the costs of a run in phases change with its steps"):
        Budget("flops").applied(chosen, base())
    other = override(chosen, {"train.phases.0.changes.data.batch_size": "1"})
    assert other.train.phases[0].changes["data.batch_size"] == 1


@pytest.mark.parametrize("position", [Rope2D(), NoPosition()], ids=lambda found: type(found).__name__)
def test_the_resolution_may_grow_unless_positions_are_learned(position):
    image = ADAPTERS["image"]
    image = image.replace(tower=image.tower.replace(position=position))
    finer = {"model.adapters.image.features.height": 16, "model.adapters.image.features.width": 16}
    chosen = in_phases((FIRST, finer), **{"model.adapters": {"image": image}})
    if position == NoPosition():  # a learned vector per patch
        with pytest.raises(
            UserError, match=r"train\.phases\.0 .*adapters/image/tower/position/table is \[4, 8\] before and"
        ):
            Phases(chosen, 258)
        return
    phases = Phases(chosen, 258)
    assert [program.model.positions for program in phases.programs] == [{"image": 4}, {"image": 16}]


@pytest.mark.slow
def test_several_seeds_go_through_phases_together(tmp_path):
    told = []

    class Told(Silent):
        def step(self, step, loss):
            told.append(loss)

    chosen = changing(**{"train.evaluate_every": None})
    train(chosen, tmp_path / "both", lambda *_: [Told()], seeds=(0, 5), on_message=lambda text: None)
    for i, seed in enumerate((0, 5)):
        train(chosen.replace(seed=seed), tmp_path / str(seed), quiet, on_message=lambda text: None)
        losses = [line["loss"] for line in lines(tmp_path / str(seed))]
        np.testing.assert_allclose([both[i] for both in told], losses, rtol=1e-4)
