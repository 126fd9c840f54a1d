"""The loop: resuming, stopping, the run folder, and what is said when something is wrong."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.data.loader import TrainBatches
from polygpt.errors import SpecError, UserError
from polygpt.evaluation.evaluate import evaluate
from polygpt.nn.positions import Learned
from polygpt.optim.schedules import Constant, Schedule
from polygpt.overrides import override
from polygpt.runtime import manifest
from polygpt.runtime.checkpoint import records
from polygpt.runtime.manifest import Record
from polygpt.spec import to_json
from polygpt.training import feed, held_out, trainer
from polygpt.training.held_out import MetricState, select_metric
from polygpt.training.loggers import JsonLines, Silent
from polygpt.training.loop import train
from polygpt.training.resuming import resume_messages
from polygpt.training.run import open_run
from polygpt.training.trainer import Trainer
from polygpt.training.workdir import load_experiment

pytestmark = pytest.mark.usefixtures("compiled_once")


def tiny(**changes):
    return override(experiment(), {"train.steps": "12", "train.evaluate_every": "null"} | changes)


def smallest(**changes):
    """Compiles in no time."""
    plain = {"model.decoder.depth": "0", "optim.accumulate": "1", "optim.ema": "null"}
    return tiny(**(plain | changes))


def quiet(workdir, step, steps):
    return [JsonLines(workdir, step)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with an evaluation every 4."""
    workdir = tmp_path_factory.mktemp("finished")
    outcome = train(tiny(**{"train.evaluate_every": "4", "train.checkpoint.keep": "1"}), workdir, quiet)
    assert (outcome.step, outcome.finished, outcome.skipped) == (12, True, {})
    return workdir


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_says_what_happened(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 12]
    trained = [line for line in lines if "loss" in line]
    assert all(line["loss"] == line["loss/next_token"] > 0 and line["gradient_norm"] > 0 for line in trained)
    assert not any("second" in name for line in lines for name in line)
    timing = [json.loads(line) for line in (finished / "timing.jsonl").read_text().splitlines()]
    assert timing and all(line["tokens_per_second"] > 0 and 0 <= line["input_wait"] <= 1 for line in timing)
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["jax"] == jax.__version__ and environment["device"] == "cpu"


def test_the_best_and_the_latest_checkpoint_open_as_the_moving_average(finished):
    losses = {line["step"]: line["metric"] for line in metrics(finished) if "metric" in line}
    best = min(losses, key=losses.get)
    run = open_run(finished, "best")
    assert (run.step, run.workdir, run.tokenizer.vocabulary) == (best, finished, 258)
    plan = run.experiment.evaluation.replace(modality_gain=False)
    layout = run.experiment.data.layout
    results = evaluate(run.model, run.params, run.tokenizer, run.model.spec.adapters, layout, plan)
    assert results["tasks"]["text"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert open_run(finished, "latest").step == 12


def test_a_finished_run_is_not_trained_again(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    outcome = train(tiny(**{"train.evaluate_every": "4", "train.checkpoint.keep": "1"}), finished, quiet)
    assert (outcome.step, outcome.finished) == (12, True)
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_same_call_goes_on_to_the_same_end(finished, tmp_path, number, capsys):
    class Interrupt(Silent):
        def step(self, step, loss):
            if step == 5:
                os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT)
    chosen = tiny(**{"train.evaluate_every": "4", "train.checkpoint.keep": "1"})
    outcome = train(chosen, tmp_path, lambda *where: [*quiet(*where), Interrupt()])
    assert not outcome.finished and 5 <= outcome.step < 12
    assert records(tmp_path / "checkpoints")[-1].step == outcome.step
    assert f"{number.name}: saving after this step" in capsys.readouterr().err
    assert train(chosen, tmp_path, quiet).finished
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    same = open_run(tmp_path, "latest").params, open_run(finished, "latest").params
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_checkpoints_by_the_clock_change_no_figure(finished, tmp_path):
    chosen = tiny(
        **{"train.evaluate_every": "4", "train.checkpoint.keep": "20", "train.checkpoint.every_minutes": "1e-9"}
    )
    assert train(chosen, tmp_path, quiet).finished
    assert [record.step for record in records(tmp_path / "checkpoints")] == list(range(1, 13))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_run_that_breaks_off_says_what_is_not_saved_and_again_when_it_goes_on(tmp_path, capsys):
    class Breaks(Silent):
        def step(self, step, loss):
            if step == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(smallest(), tmp_path, lambda *where: [*quiet(*where), Breaks()])
    assert "3 steps (8 to 10) not saved: the same command resumes at step 7" in capsys.readouterr().err
    train(smallest(), tmp_path, quiet)
    assert "steps (8 to" in (err := capsys.readouterr().err) and "lost" in err


def test_steps_are_not_saved_if_the_last_checkpoint_fails_in_the_background(tmp_path, monkeypatch, capsys):
    seal = manifest.seal

    def full(place, record, processes):
        if record.step == 12:
            raise OSError(errno.ENOSPC, "No space left on device", str(place))
        seal(place, record, processes)

    monkeypatch.setattr(manifest, "seal", full)
    with pytest.raises(UserError, match="No space left"):
        train(smallest(), tmp_path, quiet)
    assert "5 steps (8 to 12) not saved: the same command resumes at step 7" in capsys.readouterr().err


@pytest.mark.parametrize("number, step", [(2, 4), (11, 12)])
def test_an_evaluation_that_a_signal_ends_is_made_up_for(tmp_path, monkeypatch, number, step):
    chosen = smallest(**{"train.evaluate_every": "4", "evaluation.batch_size": "2"})  # four batches each
    train(chosen, tmp_path / "whole", quiet)
    whole, calls = (tmp_path / "whole" / "metrics.jsonl").read_bytes(), []
    real = Trainer._proceed

    def proceed(self):
        calls.append(self.done)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    monkeypatch.setattr(Trainer, "_proceed", proceed)
    run = tmp_path / "run"
    outcome = train(chosen, run, quiet)
    assert (outcome.step, outcome.finished, len(calls)) == (step, False, number), "at once, at the last step too"
    assert records(run / "checkpoints")[-1] == Record(step, None, True)
    assert [line for line in metrics(run) if line["step"] == step and "metric" in line] == []

    def killed(*_):
        raise InterruptedError

    for what in ["evaluation", "step"][: 2 if step < 12 else 1]:  # when it is told and not sealed; after both
        logger = Silent()
        setattr(logger, what, killed)
        with pytest.raises(InterruptedError):
            train(chosen, run, lambda *where, logger=logger: [*quiet(*where), logger])
    assert train(chosen, run, quiet).finished
    assert (run / "metrics.jsonl").read_bytes() == whole
    kept = [records(folder / "checkpoints") for folder in (tmp_path / "whole", run)]
    assert kept[0] == [record for record in kept[1] if record in kept[0]]


def test_another_configuration_in_the_same_folder_is_refused_by_its_first_difference(finished):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"optim.schedule.peak_lr is 0.003 there, 0.1 here: choose another workdir"):
        train(
            tiny(**{"train.evaluate_every": "4", "train.checkpoint.keep": "1", "optim.schedule.peak_lr": "0.1"}),
            finished,
        )
    with pytest.raises(UserError, match="train.steps is 12 there, 11 here"):
        train(tiny(**{"train.evaluate_every": "4", "train.checkpoint.keep": "1", "train.steps": "11"}), finished)
    assert (finished / "config.json").read_bytes() == before


def test_steps_may_grow(tmp_path):
    train(smallest(**{"train.steps": "2"}), tmp_path, quiet)
    longer = smallest(**{"train.steps": "4"})
    assert train(longer, tmp_path, quiet).step == 4
    assert load_experiment(tmp_path) == longer
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4]


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """A run that ended because its metric did not improve: its experiment, folder and outcome."""
    # With a learning rate of 0 every evaluation gives the same: the first is the best, and the next two are not better.
    chosen = smallest(**{"optim.schedule.peak_lr": "0", "train.evaluate_every": "2", "train.patience": "2"})
    workdir = tmp_path_factory.mktemp("stale")
    return chosen, workdir, train(chosen, workdir, quiet)


def test_training_stops_when_the_metric_has_not_improved_for_long(stale):
    chosen, workdir, outcome = stale
    assert (outcome.step, outcome.finished) == (6, True)
    again = train(chosen, workdir, quiet)
    assert (again.step, again.finished) == (6, True)


def test_a_run_that_stopped_early_goes_on_when_its_patience_is_lifted(stale, tmp_path):
    chosen, workdir, _ = stale
    run = shutil.copytree(workdir, tmp_path / "run")
    outcome = train(override(chosen, {"train.patience": "null"}), run, quiet)
    assert (outcome.step, outcome.finished) == (12, True)


def said(chosen, workdir, done, finished, **before):
    """What a person is told; `before` is what was set when the checkpoint was written."""
    return resume_messages(chosen, workdir, done, finished, to_json(override(chosen, before)))


def test_a_person_is_told_what_more_steps_do_to_the_learning_rate(tmp_path):
    """A cosine at its end is at a tenth of its peak, and in the middle at 0.55 of it."""
    chosen = override(smallest(), {"train.steps": "200", "optim.schedule.peak_lr": "1.0", "optim.schedule.warmup": "0"})
    shorter = {"train.steps": "100"}
    lines = said(chosen, tmp_path, 100, False, **shorter)
    assert len(lines) == 2 and "from 0.1 to 0.557" in lines[1]
    assert "--optim.schedule_steps 100 keeps" in lines[1] and "--optim.rewarm 10" in lines[1]
    assert len(said(chosen, tmp_path, 100, False)) == 1, "nothing has changed"
    constant = chosen.replace(optim=chosen.optim.replace(schedule=Constant(1.0)))
    assert len(said(constant, tmp_path, 100, False, **shorter)) == 1, "nothing changes"
    (finished,) = said(chosen, tmp_path, 200, True)
    assert "polygpt evaluate" in finished and "--train.steps 400 (--optim.schedule_steps 200" in finished
    (finished,) = said(constant, tmp_path, 200, True)
    assert finished.endswith("--train.steps 400"), "there is nothing to choose"
    (stopped,) = said(chosen, tmp_path, 100, True)
    assert "--train.patience null" in stopped


@pytest.mark.parametrize("chosen", [{}, {"optim.rewarm": "10"}], ids=["keep", "rewarm"])
def test_the_options_that_a_person_is_told_end_the_jump(tmp_path, chosen):
    plain = override(smallest(), {"train.steps": "200", "optim.schedule.peak_lr": "1.0", "optim.schedule.warmup": "0"})
    before = {"train.steps": "100", "optim.schedule_steps": "null", "optim.rewarm": "null"}
    extended = override(plain, {"optim.schedule_steps": "100", **chosen})
    assert len(said(extended, tmp_path, 100, False, **before)) == 1
    (again,) = said(extended, tmp_path, 200, True)
    for words in (r"--optim.schedule_steps (\d+) keeps", r"--optim.schedule_steps (\d+) --optim.rewarm (\d+)"):
        told = dict(zip(("schedule_steps", "rewarm"), map(int, re.search(words, again).groups()), strict=False))
        more = extended.replace(train=extended.train.replace(steps=400), optim=plain.optim.replace(**told))
        assert len(resume_messages(more, tmp_path, 200, False, to_json(extended))) == 1, f"{words} jumps"


@pytest.mark.parametrize(
    "more", [pytest.param({}, marks=pytest.mark.slow), {"optim.rewarm": "3"}], ids=["keep", "rewarm"]
)
def test_more_steps_keep_the_learning_rate_or_raise_it_again_and_resume_to_the_bit(tmp_path, more):
    first = {"train.steps": "6", "optim.schedule.warmup": "0"}
    train(smallest(**first), tmp_path / "run", quiet)

    class Interrupt(Silent):
        def step(self, step, loss):
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    longer = smallest(**first | {"train.steps": "12", "train.log_every": "1", "optim.schedule_steps": "6"} | more)
    whole, cut = (shutil.copytree(tmp_path / "run", tmp_path / how) for how in ("whole", "cut"))
    assert train(longer, whole, quiet).finished
    assert not train(longer, cut, lambda *where: [*quiet(*where), Interrupt()]).finished
    assert train(longer, cut, quiet).finished
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, *(open_run(run, "latest").params for run in (whole, cut)))
    rates = {line["step"]: line["learning_rate"] for line in metrics(whole)}
    cosine = [3e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi * t / steps)) / 2) for steps, t in [(6, 5), (12, 8), (12, 11)]]
    expected = {6: cosine[0], 9: cosine[1], 12: cosine[2]} if more else {6: cosine[0], 9: cosine[0], 12: cosine[0]}
    assert {step: rates[step] for step in expected} == pytest.approx(expected, rel=1e-5)


def test_the_experiment_says_which_checkpoint_is_used_where_none_is_named(stale, tmp_path):
    _, workdir, _ = stale
    assert open_run(workdir).step == 2 and open_run(workdir, "latest").step == 6
    copy = shutil.copytree(workdir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["train"]["use"] = "latest"
    (copy / "config.json").write_text(json.dumps(config))
    assert open_run(copy).step == 6 and open_run(copy, "best").step == 2


def test_an_error_of_the_evaluation_at_the_last_step_leaves_a_checkpoint_of_it(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("a held-out record is corrupt")

    monkeypatch.setattr(held_out, "evaluate", fail)
    with pytest.raises(UserError, match="a held-out record is corrupt"):
        train(smallest(**{"train.steps": "3", "train.evaluate_every": "3"}), tmp_path, quiet)
    (record,) = records(tmp_path / "checkpoints")
    assert (record.step, record.metric, record.finite) == (3, None, True)


def test_a_signal_that_comes_just_before_the_loop_ends_is_saved_too(tmp_path, monkeypatch):
    # The test of the loop asks for patience and then for the signal: what comes in between comes after all of a step.
    def request(run):
        run.interruption.requested = run.done == 5
        return False

    monkeypatch.setattr(trainer.Trainer, "_finished", request)
    outcome = train(smallest(**{"train.log_every": "1"}), tmp_path, quiet)
    assert (outcome.step, outcome.finished) == (5, False)
    assert [record.step for record in records(tmp_path / "checkpoints")] == [5]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5], "the last step's metrics are written"


def test_records_left_out_are_counted_up_to_the_last_batch_that_was_consumed(tmp_path, monkeypatch):
    class Ahead:
        """The batches, with a record left out before each."""

        last_examples = ()

        def __init__(self, batches):
            self.batches, self.drawn = batches, 0

        def __iter__(self):
            return self

        def __next__(self):
            self.drawn += 1
            return next(self.batches)

        def get_state(self):
            return {**self.batches.get_state(), "skipped": {"empty text": self.drawn}}

        def close(self):
            self.batches.close()

    made = feed.train_batches
    monkeypatch.setattr(feed, "train_batches", lambda *given, **named: Ahead(made(*given, **named)))
    outcome = train(smallest(**{"train.steps": "3", "train.prefetch": "4"}), tmp_path, quiet)
    assert outcome.skipped == {"empty text": 3}


def test_the_standing_counts_evaluations_without_a_better_metric():
    standing = MetricState()
    assert [standing.update(value, "higher") for value in (0.1, float("nan"), 0.3, 0.3, 0.2)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert standing == MetricState(best=0.3, stale=2, waited=2)


@dataclasses.dataclass(frozen=True)
class Exploding(Schedule):
    """Constant, and infinite from a step on."""

    at: int = 15

    def build(self, steps):
        return lambda t: jnp.where(t < self.at, self.peak_lr, jnp.inf)


def test_too_many_steps_that_are_not_finite_end_the_run_and_leave_the_checkpoint(tmp_path):
    chosen = smallest(**{"train.steps": "40", "train.max_nonfinite": "3"})
    chosen = chosen.replace(optim=chosen.optim.replace(schedule=Exploding(1e-3)))
    with pytest.raises(UserError, match=r"step 18: .* 3 times in a row; the checkpoint of step 14 is intact"):
        train(chosen, tmp_path, quiet)
    run = open_run(tmp_path)
    assert run.step == 14 and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(run.params))
    assert metrics(tmp_path)[-1]["step"] == 18 and metrics(tmp_path)[-1]["skipped"] == 3


def test_a_full_disk_is_one_clear_line(tmp_path):

    def onto_the_full_disk(workdir, step, steps):
        logger = JsonLines.__new__(JsonLines)
        logger._files = {name: open("/dev/full", "a") for name in ("metrics", "timing")}
        return [logger]

    with pytest.raises(UserError, match=r"cannot write .*No space left on device: free some space") as error:
        train(smallest(), tmp_path, onto_the_full_disk)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*: Not a directory: choose another --workdir"):
        train(tiny(), tmp_path / "file" / "run")


def test_rows_that_microbatches_do_not_divide_are_refused_and_leave_no_folder(tmp_path):
    with pytest.raises(UserError, match="data.batch_size is 5: it must be a multiple of 2"):
        train(tiny(**{"data.batch_size": "5"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_id_outside_the_vocabulary_in_a_later_batch_is_one_line(tmp_path, monkeypatch):
    drawn, real = [], TrainBatches.__next__

    def corrupted(batches):
        drawn.append(real(batches))
        if len(drawn) == 4:
            drawn[-1].tokens_BT[1, 2] = 100_000
        return drawn[-1]

    monkeypatch.setattr(TrainBatches, "__next__", corrupted)
    with pytest.raises(UserError, match=r"row 1, position 2: a token outside \[0, \d+\)"):
        train(smallest(), tmp_path / "run", quiet)
    assert (tmp_path / "run").exists(), "three steps were taken"


def test_an_experiment_that_is_refused_by_its_first_batch_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(batches):
        raise UserError("too long")

    monkeypatch.setattr(TrainBatches, "__next__", refuse)
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(UserError, match="too long"):
            train(smallest(), tmp_path / name, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run"])
def test_a_bucket_is_refused_at_once(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (lambda: train(smallest(), address, quiet), lambda: open_run(address)):
        with pytest.raises(UserError, match="mount the bucket"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_test_record_without_a_prompt_is_told_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="evaluation task 'text': .* has no prompt to answer: set generate to false"):
        train(smallest(**{"evaluation.tasks.text.generate": "true"}), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_checkpoint_may_take_another_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny(seed="5"))))
    chosen = smallest(**{"train.steps": "2"})
    assert train(chosen, tmp_path, quiet).finished
    assert load_experiment(tmp_path) == chosen


def test_no_run_folder_and_no_checkpoint_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="is not a run folder: it has no config.json"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny())))
    with pytest.raises(UserError, match="has no complete checkpoint"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.metric": "txt/loss"}, "train.metric: the metric 'txt/loss' belongs to no held-out task: did you mean"),
        (
            {"train.metric": "text/token_accuracy"},
            "train.better is 'lower', but higher values of text/token_accuracy are better: write --train.better higher",
        ),
        ({"train.metric": "accuracy"}, "metric is 'accuracy'"),
        (
            {"train.metric": "text/accuracy"},
            "the metric 'text/accuracy' must be one of loss, perplexity, bits_per_byte, token_accuracy of text, "
            "unless train.evaluate is full and the task's generate is true",
        ),
        ({"train.evaluate": "full", "train.metric": "text/accuracy"}, "metric 'text/accuracy' must be"),
        ({"train.patience": "2"}, "patience is 2: it must be null without evaluate_every"),
        ({"evaluation.tasks": "{}", "train.evaluate_every": "2"}, "evaluate_every is 2: it must be null"),
        ({"name": "a/b"}, "name is 'a/b'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        tiny(**changes)


def test_a_metric_of_written_answers_needs_a_full_evaluation_with_answers():
    written = {"evaluation.tasks.text.generate": "true", "train.evaluate": "full", "train.metric": "text/accuracy"}
    assert tiny(**written, **{"train.better": "higher"}).train.metric == "text/accuracy"
    assert tiny(**{"train.metric": "text/bits_per_byte"}).train.evaluate == "loss"


def test_rows_longer_than_the_position_encoding_are_refused():
    chosen = tiny()

    def learned(length):
        decoder = chosen.model.decoder.replace(position=Learned(length))
        return chosen.replace(model=chosen.model.replace(decoder=decoder))

    assert learned(64).data.layout.seq_len == 64
    with pytest.raises(SpecError, match=r"LayoutSpec.seq_len is 64: it must be at most 63, .* model.decoder.position"):
        learned(63)
    with pytest.raises(SpecError, match="evaluation task 'text' has seq_len 65, .*position supports 64"):
        override(learned(64), {"evaluation.tasks.text.seq_len": "65"})


def test_the_metric_is_the_mean_loss_or_a_tasks_figure():
    tasks = {"sum": {"loss": 1.0, "accuracy": 0.75}, "text": {"loss": 2.0}}
    assert select_metric(tasks, "loss") == 1.5 and select_metric(tasks, "loss", ["sum"]) == 1.0
    assert select_metric(tasks, "sum/accuracy") == 0.75
    with pytest.raises(UserError, match="train.metric is 'text/accuracy', but text has only loss: choose one of these"):
        select_metric(tasks, "text/accuracy")


def test_a_checkpoint_that_cannot_be_read_is_one_clear_line(tmp_path):
    train(smallest(**{"train.steps": "1"}), tmp_path, quiet)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "params")
    with pytest.raises(UserError, match=r"can be read \(1: params/.* missing") as error:
        open_run(tmp_path)
    assert "\n" not in str(error.value)


def test_compiling_is_told_before_and_after_and_once(tmp_path):
    told = []

    class Listening(Silent):
        def compiling(self, step, seconds):
            told.append((step, seconds))

        def step(self, step, loss):
            told.append(step)

    train(smallest(**{"train.steps": "2"}), tmp_path, lambda *where: [Listening()])
    (first, nothing), (again, seconds), *steps = told
    assert (first, nothing, again, steps) == (1, None, 1, [1, 2]) and seconds > 0


def test_a_folder_that_cannot_be_made_is_told():
    with pytest.raises(UserError, match="cannot create /proc/none/run: No such file or directory: choose another --wo"):
        train(smallest(), "/proc/none/run", quiet)
