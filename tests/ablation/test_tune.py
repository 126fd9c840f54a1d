"""polygpt tune: searches go on where they were stopped or killed, and say what they found; on a made-up loss mostly."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from polygpt.ablation import budget, tune
from polygpt.ablation.tune import Choice, Float, Int, Search
from polygpt.ablation.tuning import report, summary, trials
from polygpt.ablation.tuning import storage as storages
from polygpt.ablation.tuning.run import run
from polygpt.attention.multi_head import MultiHead
from polygpt.cli.main import main
from polygpt.data.layout import LayoutSpec
from polygpt.data.loader import DataSpec, Task
from polygpt.data.sources.text_files import TextFiles
from polygpt.errors import Diverged, SpecError, UserError
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.models.decoder import DecoderSpec
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.mlp import MLP, GatedMLP
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupCosine
from polygpt.runtime.storage import storage_faults
from polygpt.spec import to_json
from polygpt.training.experiment import Experiment, TrainSpec

optuna = pytest.importorskip("optuna")

LICENSE = os.path.join(os.path.dirname(__file__), "..", "..", "LICENSE")
PEAK, DEPTH, HEADS = "optim.schedule.peak_lr", "model.decoder.depth", "model.decoder.attention.heads"
KNOBS = {PEAK: Float(1e-4, 1e-1, log=True), DEPTH: Int(1, 3)}


def experiment(steps=20):
    text = TextFiles((os.path.abspath(LICENSE),), unit="chunk", bytes=40)
    return Experiment(
        name="tiny",
        data=DataSpec({"text": Task(text)}, LayoutSpec(seq_len=48), batch_size=2),
        model=ModelSpec(DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2))),
        optim=Optim(WarmupCosine(1e-2)),
        evaluation=EvaluationSpec({"text": EvalTask(text, limit=4)}, batch_size=4),
        train=TrainSpec(steps=steps, log_every=5),
    )


def search(dimensions=KNOBS, **settings):
    return Search(experiment(), dimensions, **settings)


def loss_of(made):
    """Best at a learning rate of 0.01 and three layers."""
    return 2 + abs(math.log10(made.optim.schedule.peak_lr) + 2) + 0.2 * (3 - made.model.decoder.depth)


COSTS = {}


def costs_once(made):
    """The costs of an experiment, which depend on its model alone here, counted once a model."""
    model = json.dumps(to_json(made.model))
    if model not in COSTS:
        COSTS[model] = budget.costs(made)
    return COSTS[model]


@pytest.fixture
def trained(monkeypatch):
    """Training of no time, in place of the real one: the loss falls by the formula. `hook` may raise at any step."""
    monkeypatch.setattr(trials, "costs", costs_once)
    made = SimpleNamespace(runs=[], hook=lambda experiment, step: None)

    def train(experiment, workdir, loggers):
        workdir.mkdir(parents=True, exist_ok=True)
        steps, every = experiment.train.steps, experiment.train.evaluate_every
        made.runs.append(experiment)
        told = loggers(workdir, 0, steps)
        try:
            for step in range(1, steps + 1):
                made.hook(experiment, step)
                value = loss_of(experiment) + 3 * (1 - step / steps)
                for logger in told:
                    logger.step(step, value)
                    if every and step % every == 0:
                        logger.evaluation(step, {"metric": value, "tasks": {"text": {"loss": value, "n": 4}}})
                    if step % experiment.train.log_every == 0:
                        logger.metrics(step, {"loss": value})
        finally:
            for logger in told:
                logger.close()
        return SimpleNamespace(finished=True)

    monkeypatch.setattr(trials, "train", train)
    return made


def given_up(storage):
    return [trial for trial in storage.finished() if trial.state == optuna.trial.TrialState.PRUNED]


def number(trial):
    return trial["number"]


def values(storage):
    """What was chosen in the trials that count, in order."""
    return [tuple(trial.params.values()) for trial in storage.finished()]


def test_the_best_values_are_found(tmp_path, trained):
    stood = []
    found = summary.summarize(run(search(trials=16), tmp_path, callback=stood.append))
    best = found.trial(found.best[0])
    assert len(trained.runs) == 16 and len(found.trials) == 16 and best["values"][DEPTH] == 3
    assert best["objectives"]["text/loss"] == min(t["objectives"]["text/loss"] for t in found.trials) < 2.4
    assert best["objectives"]["text/loss"] == pytest.approx(loss_of(search().experiment(best["values"])))
    assert set(found.importance) == {"fANOVA", "PED-ANOVA"}
    assert all(shares[PEAK] > shares[DEPTH] for shares in found.importance.values())
    assert found.command(best) == [f"--{PEAK}", str(best["values"][PEAK]), f"--{DEPTH}", "3"]
    assert [len(s.finished) for s in stood][-1] == 16 and stood[-1].wanted == 16 and not stood[-1].running
    assert not list((tmp_path / "trials").iterdir())


def test_an_interrupted_search_tries_what_one_that_was_not_does(tmp_path, trained):
    whole = values(run(search(trials=9), tmp_path / "whole"))

    def hook(experiment, step):
        if len(trained.runs) in (12, 15) and step == 7:
            trained.runs.append("interrupted")
            raise KeyboardInterrupt

    trained.hook = hook
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(search(trials=9), tmp_path / "cut")
    cut = run(search(trials=9), tmp_path / "cut")
    assert values(cut) == whole and len({t.user_attrs.get("continues") for t in cut.finished()} - {None}) == 2


def test_what_a_dead_process_left_is_gone_on_with_and_given_up_in_the_end(tmp_path):
    asked = search(trials=9)
    numbers, places = [], []
    for _ in range(storages.DEATHS):
        storage = storages.Storage(asked, tmp_path)
        with storage.next() as (trial, place):
            numbers.append(trial.number)
            places.append(place)
            with storages.Storage(asked, tmp_path).next() as (other, elsewhere):  # it is alive: it is left alone
                assert elsewhere != place
                storage.complete(other, [1.0])
            values = dict(trial.params)
    assert len(set(numbers)) == 3 and len(set(places)) == 1
    storage = storages.Storage(asked, tmp_path)
    with storage.next() as (trial, place):
        assert trial.params != values and place != places[0]
    (one,) = storage.failed()
    assert one.params == values and one.user_attrs["reason"] == "its process died 3 times"
    assert not given_up(storage), "the sampler takes it for no bad trial"
    found = summary.summarize(storage)
    assert [failed["number"] for failed in found.failed] == [one.number] == [numbers[-1]]
    assert "its process died 3 times" in report.markdown(found, []) and one.number not in map(number, found.trials)


def test_more_trials_go_on_and_another_search_is_refused(tmp_path, trained):
    run(search(trials=2), tmp_path)
    assert len(run(search(trials=5, pruning="median"), tmp_path).finished()) == 5 and len(trained.runs) == 5
    with pytest.raises(
        UserError, match=r"has a different search: dimensions.model.decoder.depth.high is 3 there, 4 here"
    ):
        run(search({**KNOBS, DEPTH: Int(1, 4)}), tmp_path)
    with pytest.raises(UserError, match=r"different search: against is null there, \"flops\" here: choose another"):
        run(search(against="flops"), tmp_path)


def test_a_line_that_was_torn_does_not_lose_the_others(tmp_path, trained):
    run(search(trials=2), tmp_path)
    with (tmp_path / "journal.log").open("a") as file:
        file.write('{"op_code": 4, "worker')
    assert len(run(search(trials=3), tmp_path).finished()) == 3


def test_runs_that_diverge_or_do_not_fit_are_told_with_the_reason(tmp_path, trained):
    def hook(made, step):
        if made.optim.schedule.peak_lr > 0.02:
            raise Diverged("step 5: not finite")
        if made.optim.schedule.peak_lr < 0.0005:
            raise MemoryError
        if made.optim.schedule.peak_lr < 0.002:
            raise ZeroDivisionError("by nothing")

    trained.hook = hook
    dimensions = {**KNOBS, HEADS: Choice((2, 3))}
    storage = run(search(dimensions, trials=16), tmp_path)
    reasons = {t.user_attrs["reason"].partition(":")[0]: t for t in given_up(storage)}
    assert set(reasons) == {"diverged", "does not fit", "failed", "out of memory"}
    assert reasons["diverged"].params[PEAK] > 0.02 and reasons["failed"].params[PEAK] < 0.002
    assert reasons["does not fit"].params[HEADS] == "3" and "divisor" in reasons["does not fit"].user_attrs["reason"]
    text = report.write(summary.summarize(storage), tmp_path).read_text()
    assert "diverged: step 5: not finite" in text and "failed: ZeroDivisionError: by nothing (twice)" in text
    assert len(storage.finished()) == 16 and not storage.failed()
    assert "16 of 16 trials" in text and "Importances from" in text


FAULTS = [
    OSError(28, "No space left on device"),
    ConnectionError("the file server is gone"),
    jax.errors.JaxRuntimeError("INTERNAL: device lost"),
]


def write_to_a_full_disk(workdir):
    """As training does it."""
    with storage_faults(workdir):
        raise OSError(28, "No space left on device", str(workdir / "metrics.jsonl"))


@pytest.mark.parametrize("fault", [*FAULTS, None], ids=lambda fault: type(fault).__name__)
def test_a_failure_of_the_machine_is_no_bad_trial_and_is_resumed(tmp_path, trained, fault):
    whole = values(run(search(trials=6), tmp_path / "whole"))
    trained.runs.clear()

    def hook(made, step):
        if len(trained.runs) == 4 and step == 7:
            trained.runs.append("failed")
            if fault is None:
                write_to_a_full_disk(tmp_path / "cut" / "trials" / "3" / "run")
            raise fault

    trained.hook = hook
    with pytest.raises(type(fault) if fault else UserError):
        run(search(trials=6), tmp_path / "cut")
    storage = run(search(trials=6), tmp_path / "cut")
    assert values(storage) == whole and not given_up(storage) and not storage.failed()


def test_an_error_that_does_not_come_back_is_no_bad_trial(tmp_path, trained):
    def hook(made, step):
        if len(trained.runs) == 4 and step == 7:
            trained.runs.append("failed")
            raise ZeroDivisionError("once")

    trained.hook = hook
    storage = run(search(trials=6), tmp_path)
    assert len(storage.complete_ones()) == 6 and not given_up(storage)


def test_a_loss_that_is_not_finite_counts_as_diverged(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "loss_of", lambda made: math.nan)
    storage = run(search(trials=3), tmp_path)
    assert [t.user_attrs["reason"].partition(":")[0] for t in given_up(storage)] == ["diverged"] * 3
    assert summary.summarize(storage).best == []


def test_an_error_before_anything_went_well_ends_the_search_and_is_no_trial(tmp_path, trained):
    def hook(made, step):
        raise UserError("no text file 'gone'")

    trained.hook = hook
    with pytest.raises(UserError, match="no text file 'gone'"):
        run(search(trials=3), tmp_path)
    trained.hook = lambda made, step: None
    assert [len(trial.values) for trial in run(search(trials=3), tmp_path).finished()] == [1, 1, 1]


@pytest.mark.parametrize("pruning", ["median", "halving"])
def test_runs_that_do_badly_are_given_up_and_the_best_is_not(tmp_path, trained, pruning):
    counts = []
    trained.hook = lambda made, step: counts.append(step)
    storage = run(search(trials=15, pruning=pruning, sampler="random"), tmp_path)
    pruned = given_up(storage)
    assert 3 <= len(pruned) < 15 and len(counts) < 15 * 20
    assert all(re.match(r"worse than others at \d+ %: text/loss \d", t.user_attrs["reason"]) for t in pruned)
    losses = {trial.number: loss_of(search().experiment(trial.params)) for trial in storage.finished()}
    assert summary.summarize(storage).best == [min(losses, key=losses.get)]


def test_training_losses_can_be_searched_by(tmp_path, trained):
    asked = search(trials=5, metric="train/loss", pruning="median")
    asked = asked.replace(base=asked.base.replace(evaluation=EvaluationSpec()))
    storage = run(asked, tmp_path)
    for trial in storage.finished()[:4]:
        last = [loss_of(asked.experiment(trial.params)) + 3 * (1 - step / 20) for step in (19, 20)]
        assert trial.values[0] == pytest.approx(sum(last) / 2) and sorted(trial.intermediate_values)[-1] == 100


def test_loss_against_flops_gives_a_front(tmp_path, trained):
    storage = run(search(trials=12, against="flops", seed=1), tmp_path)
    found = summary.summarize(storage)
    points = {t["number"]: tuple(t["objectives"].values()) for t in found.trials}
    for trial in found.trials:
        assert points[trial["number"]][1] == 20 * costs_once(search().experiment(trial["values"])).flops
    beaten = {a for a, p in points.items() for q in points.values() if q[0] <= p[0] and q[1] <= p[1] and q != p}
    assert set(found.best) == set(points) - beaten and len(found.best) > 1
    assert [points[n][1] for n in found.best] == sorted(points[n][1] for n in found.best)
    report.write(found, tmp_path)
    pictures = {"history.png", "slices.png", "importance.png", "front.png"}
    assert pictures <= {path.name for path in tmp_path.iterdir()}
    data = json.loads((tmp_path / "summary.json").read_text())
    assert [trial["number"] for trial in data["best"]] == found.best and data["best"][0]["overrides"][0] == f"--{PEAK}"


def test_options_may_change_several_fields():
    options = {"plain": {}, "gated": {"model.decoder.mlp": GatedMLP(), "model.decoder.depth": 2}}
    asked = search({PEAK: KNOBS[PEAK], "kind": Choice(options)}, pruning="halving")
    made = asked.experiment({PEAK: 0.01, "kind": "gated"})
    assert made.model.decoder.depth == 2 and made.model.decoder.mlp == GatedMLP() and made.train.evaluate_every == 2
    assert asked.experiment({PEAK: 0.01, "kind": "plain"}).model == asked.base.model


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        (f"{PEAK}=log:1e-4:1e-2", Float(1e-4, 1e-2, log=True)),
        ("model.decoder.dropout=float:0:0.3", Float(0.0, 0.3)),
        (f"{DEPTH}=int:2:6", Int(2, 6)),
        ("model.decoder.width=int:64:256:64", Int(64, 256, step=64)),
        ("model.decoder.width=log:16:64", Int(16, 64, log=True)),
        (f"{HEADS}=choice:1,2", Choice({"1": {HEADS: 1}, "2": {HEADS: 2}})),
        (
            "model.decoder.mlp=choice:polygpt.nn.mlp:MLP,polygpt.nn.mlp:GatedMLP",
            Choice(
                {
                    "polygpt.nn.mlp:MLP": {"model.decoder.mlp": MLP()},
                    "polygpt.nn.mlp:GatedMLP": {"model.decoder.mlp": GatedMLP()},
                }
            ),
        ),
    ],
)
def test_knobs_are_read_from_a_command_line(text, dimension):
    name, _, rest = text.partition("=")
    assert tune.read_dimension(experiment(), name, rest) == dimension


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: search({"optim.schedule.peek": Float(0, 1)}),
            "dimension 'optim.schedule.peek'.*mean optim.schedule.peak_lr",
        ),
        (lambda: search({DEPTH: Float(1, 2)}), "dimension 'model.decoder.depth' is 1.0: it must be int"),
        (lambda: search({"x": Choice({"a": {}, "b": {"modle.x": 1}})}), "option 'b': no field 'modle.x'"),
        (lambda: search({}), "Search.dimensions"),
        (lambda: search(metric="txt/loss"), "'txt/loss' belongs to no held-out task: did you mean text"),
        (lambda: search(metric="loss"), "must be 'task/measure'"),
        (lambda: search(pruning="median", against="flops"), "Search.pruning is 'median': it must be null with two"),
        (lambda: Float(1, 1), "Float.high is 1.0: it must be more than 1.0"),
        (lambda: Float(0, 1, log=True), "Float.low is 0.0: it must be positive where log is true"),
        (lambda: Int(1, 9, step=2, log=True), "Int.step is 2: it must be at least 1, and 1 where log is true"),
        (lambda: Choice((1, 1)), "Choice.options .*: it must be at least two that differ"),
        (lambda: Choice("ab"), "Choice.options is 'ab': it must be a list of plain values, or a mapping"),
        (
            lambda: tune.read_dimension(experiment(), PEAK, "log:a:b"),
            "'a:b' is not a numeric range: write float:LOW:HIGH",
        ),
        (lambda: tune.read_dimension(experiment(), PEAK, "uniform:1:2"), "write float:LOW:HIGH, log:LOW:HIGH"),
    ],
)
def test_what_cannot_be_searched_is_said(make, text):
    with pytest.raises(SpecError, match=text):
        make()


FILE = """
import sys
sys.path.insert(0, {folder!r})
from test_tune import KNOBS, experiment
from polygpt.ablation.tune import Search
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(folder=os.path.dirname(os.path.abspath(__file__))))
    return path


def test_the_command_line_searches_and_goes_on(file, trained, capsys):
    words = [
        "tune",
        str(file),
        "--dimension",
        f"{PEAK}=log:1e-4:1e-1",
        "--dimension",
        f"{DEPTH}=int:1:3",
        "--train.steps",
        "10",
    ]
    assert main([*words, "--trials", "5", "--json"]) == 0
    said = capsys.readouterr()
    data = json.loads(said.out)
    assert data["folder"] == "tuned/tiny" and len(data["trials"]) == 5 and len(data["best"]) == 1
    assert {made.train.steps for made in trained.runs} == {10}
    assert "trial 4 (5 of 5): optim.schedule.peak_lr" in said.err
    assert main([*words, "--trials", "7"]) == 0
    said = capsys.readouterr()
    assert len(trained.runs) == 7 and "resuming after 5 trials" in said.err
    assert "train with these values: polygpt train" in said.out
    assert {"report.md", "history.png", "slices.png", "importance.png"} <= set(os.listdir("tuned/tiny"))


def test_a_file_may_make_the_search(file, trained, capsys):
    with file.open("a") as end:
        end.write("def search():\n    return Search(experiment(), KNOBS, trials=3, against='parameters')\n")
    assert main(["tune", str(file), "--json", "--sampler", "nsga2", "--folder", "elsewhere"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["trials"]) == 3 and set(data["best"][0]["objectives"]) == {"text/loss", "parameters"}
    assert json.loads((file.parent / "elsewhere" / "search.json").read_text())["sampler"] == "nsga2"


def test_find_search_gives_what_search_makes_and_nothing_else(file):
    def with_search(name, made):
        other = file.with_name(name)  # a file that was loaded is not read again
        other.write_text(file.read_text() + f"def search():\n    return {made}\n")
        return other

    assert tune.find_search(file) is None
    assert tune.find_search(with_search("three.py", "Search(experiment(), KNOBS, trials=3)")).trials == 3
    with pytest.raises(UserError, match="search.. returns dict: it must return a Search"):
        tune.find_search(with_search("none.py", "KNOBS"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no function search(): write `def search() -> Search:` in it, or give --dimension"),
        (["--dimension", PEAK], "write FIELD=RANGE"),
        (["--dimension", "optim.schedule.peek=log:1e-4:1e-2"], "did you mean optim.schedule.peak_lr"),
        (["--dimension", f"{PEAK}=log:1e-4:1e-2", "--trails", "3"], "did you mean --trials"),
        (["--dimension", f"{PEAK}=log:1e-4:1e-2", "--trials", "0"], "not a positive integer"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(file, capsys, words, text):
    with file.open("a") as end:
        end.write("")
    assert main(["tune", str(file), *words]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1


def test_without_optuna_the_extra_is_named(file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", str(file), "--dimension", f"{PEAK}=log:1e-4:1e-2"]) == 2
    assert "pip install -e '.[tune]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_killed_in_the_midst_goes_on_with_the_same_run(file):
    """Real training in two processes, of which one is killed and the whole is interrupted; then on in one."""
    with file.open("a") as end:
        end.write(f"def search():\n    return Search(experiment(400), {{{PEAK!r}: KNOBS[{PEAK!r}]}}, trials=4)\n")
    words = [sys.executable, "-m", "polygpt.cli.main", "tune", str(file), "--train.checkpoint.every", "20"]
    place = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [*words, "--workers", "2"], env=os.environ | place, stderr=subprocess.PIPE, text=True
    ) as first:
        try:
            saved = wait_for(file.parent.glob, "tuned/tiny/trials/*/run/checkpoints/*/_CHECKPOINT_METADATA")
            children = subprocess.check_output(["pgrep", "-P", str(first.pid)], text=True).split()
            assert len(children) == 2
            os.kill(int(children[0]), signal.SIGKILL)
            time.sleep(2)
            first.send_signal(signal.SIGINT)
            assert first.wait(400) == 1 and "interrupted, saved: the same command resumes" in first.stderr.read()
        finally:
            first.kill()
    assert saved and not any(os.path.exists(f"/proc/{child}") for child in children)
    done = subprocess.run([*words, "--json"], env=os.environ | place, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert len(data["trials"]) == 4 and all(trial["reason"] is None for trial in data["trials"])
    assert len({trial["values"][PEAK] for trial in data["trials"]}) == 4
    shutil.rmtree(file.parent / "tuned")


def wait_for(look, pattern, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := list(look(pattern)):
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {pattern}")
