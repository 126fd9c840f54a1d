"""Rewinds in the loop: back to a checkpoint, on with later data, the same to the bit wherever the run is cut."""

import contextlib
import dataclasses
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest
from tiny_experiment import experiment

from polygpt.errors import UserError
from polygpt.overrides import override
from polygpt.training import feed, prefetch
from polygpt.training.loggers import JsonLines, Silent
from polygpt.training.loop import train
from polygpt.training.phase import Phase
from polygpt.training.run import open_run
from polygpt.training.spikes import SpikeSpec

pytestmark = pytest.mark.usefixtures("compiled_once")
STEPS, EVERY = 18, 4
BAD = {10, 11, 12}
"""Which batches, counted from 1, ask for bytes that no text has."""


def chosen(**spikes):
    changes = {"model.decoder.depth": "0", "optim.accumulate": "1", "train.evaluate_every": "null"}
    changes |= {"train.steps": str(STEPS), "train.log_every": "1", "train.checkpoint.every": str(EVERY)}
    changes |= {"optim.schedule.peak_lr": "0.01"}
    found = override(experiment(), changes)
    return found.replace(train=found.train.replace(spikes=SpikeSpec(window=4, sigmas=8.0, **spikes)))


class Numbered:
    """The batches with some made bad and others left out, by their numbers."""

    def __init__(self, batches, left_out):
        self.batches, self.left_out, self.number, self.last_examples = batches, left_out, 0, ()

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        self.number += 1
        if self.number in self.left_out:
            return next(self)
        return dataclasses.replace(batch, target_BT=np.full_like(batch.target_BT, 200)) if self.number in BAD else batch

    def get_state(self):
        return self.batches.get_state() | {"number": self.number}

    def set_state(self, states):
        self.batches.set_state(states)
        self.number = states[0]["number"]

    def under(self, data, adapters):
        return type(self)(self.batches.under(data, adapters), self.left_out)

    def close(self):
        self.batches.close()


@pytest.fixture
def numbered(monkeypatch):
    """Called with batches to leave out; from then on the trainer's are those."""
    made = feed.train_batches

    def use(left_out=()):
        monkeypatch.setattr(feed, "train_batches", lambda *given, **named: Numbered(made(*given, **named), left_out))

    use()
    return use


def quiet(workdir, step, steps):
    return [JsonLines(workdir, step)]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


REWINDING = dict(action="rewind", patience=2)


def test_spikes_are_skipped_and_counted(tmp_path, numbered):
    assert train(chosen(), tmp_path, quiet).step == STEPS
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["spikes_in_row"] for line in found[8:13]] == [0, 1, 2, 3, 0]
    assert found[-1]["spikes"] == found[-1]["skipped"] == 3 and found[-1]["rewinds"] == 0


def test_a_rewind_goes_on_with_the_data_after_the_spikes(tmp_path, numbered):
    train(chosen(**REWINDING), tmp_path / "rewound", quiet)
    found = lines(tmp_path / "rewound")
    assert found[EVERY * 2] == {"step": 9, "rewound_from": 11}
    trained = [line for line in found if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    last = trained[-1]
    assert (last["spikes"], last["skipped"], last["rewinds"]) == (3, 1, 1), "batch 12 is a spike of the new course"

    numbered(left_out={9, 10, 11})  # what the run saw between its checkpoint and the second spike
    train(chosen(), tmp_path / "without", quiet)
    expected = lines(tmp_path / "without")
    # Two programs, of which one watches for spikes: they may round differently.
    np.testing.assert_allclose([line["loss"] for line in trained], [line["loss"] for line in expected], rtol=1e-6)
    ours, others = (jax.tree.leaves(open_run(tmp_path / name).params) for name in ("rewound", "without"))
    for got, wanted in zip(ours, others, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


class Cut(Silent):
    """Ends the run at a step: by a signal, which saves, or by an error, which like a kill does not."""

    def __init__(self, at, how):
        self.at, self.how = at, how

    def step(self, step, loss):
        if step == self.at:
            self.at = None
            if self.how == "killed":
                raise InterruptedError
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The metrics of the run that is never cut."""
    workdir = tmp_path_factory.mktemp("whole")
    made = feed.train_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "train_batches", lambda *given, **named: Numbered(made(*given, **named), ()))
        train(chosen(**REWINDING), workdir, quiet)
    return (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "how, steps",
    [  # of 8 and 9 two checkpoints remain
        pytest.param("killed", [6], marks=pytest.mark.slow),
        ("stopped", [8, 9]),
        ("stopped", [11]),
        ("killed", [13]),
    ],
)
def test_a_run_with_a_rewind_that_is_cut_repeats_itself_to_the_bit(tmp_path, numbered, whole, how, steps):
    for at in steps:
        cut = Cut(at, how)
        with pytest.raises(InterruptedError) if how == "killed" else contextlib.nullcontext():
            assert not train(chosen(**REWINDING), tmp_path, lambda *where, cut=cut: [*quiet(*where), cut]).finished
    assert train(chosen(**REWINDING), tmp_path, quiet).finished
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


class Hanging(Numbered):
    """Batches of which one that is fetched ahead of the rewind hangs until it is released, after the rewind."""

    hangs, release = threading.Event(), threading.Event()

    def __next__(self):
        if self.number == 13 and not self.release.is_set():
            self.hangs.set()
            assert self.release.wait(60)
        return super().__next__()


class Releasing(Silent):
    def rewind(self, step, before):
        Hanging.release.set()


def test_what_a_source_that_hung_gives_after_a_rewind_is_nobodys(tmp_path, monkeypatch, caplog, whole):
    made, close = feed.train_batches, prefetch.Prefetch.close
    monkeypatch.setattr(prefetch, "GRACE", 0.2)
    monkeypatch.setattr(feed, "train_batches", lambda *given, **named: Hanging(made(*given, **named), ()))
    # Two batches are ready when the run goes back, and the thread is at the next, however slow the machine is.
    monkeypatch.setattr(prefetch.Prefetch, "close", lambda self: Hanging.hangs.wait(60) and close(self))
    assert train(chosen(**REWINDING), tmp_path, lambda *where: [*quiet(*where), Releasing()]).finished
    assert "did not yield its next batch" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_spikes_before_the_first_checkpoint_go_back_to_the_beginning(tmp_path, numbered):
    early = chosen(**REWINDING)
    early = early.replace(train=early.train.replace(checkpoint=early.train.checkpoint.replace(every=50)))
    train(early, tmp_path, quiet)
    assert lines(tmp_path)[0] == {"step": 1, "rewound_from": 11}


def test_too_many_rewinds_are_one_clear_line(tmp_path, numbered):
    with pytest.raises(
        UserError, match=r"step 11: the loss spiked 2 times in a row, after 0 rewinds: lower the"
    ) as error:
        train(chosen(**REWINDING, rewinds=0), tmp_path, quiet)
    assert "\n" not in str(error.value)
    assert open_run(tmp_path).step == 8


@pytest.mark.parametrize("how, at", [("stopped", 8), pytest.param("killed", 13, marks=pytest.mark.slow)])
def test_a_rewind_goes_back_to_an_earlier_phase(tmp_path, numbered, how, at):
    found = chosen(**REWINDING)
    late = found.train.checkpoint.replace(every=50)
    found = found.replace(train=found.train.replace(checkpoint=late, phases=(Phase(5, {"data.batch_size": 8}),)))
    train(found, tmp_path / "whole", quiet)
    whole = lines(tmp_path / "whole")
    assert whole[0] == {"step": 1, "rewound_from": 11} and len(whole) == STEPS + 1
    cut = Cut(at, how)
    with pytest.raises(InterruptedError) if how == "killed" else contextlib.nullcontext():
        assert not train(found, tmp_path / "cut", lambda *where: [*quiet(*where), cut]).finished
    assert train(found, tmp_path / "cut", quiet).finished
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
