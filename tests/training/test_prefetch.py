"""Prefetching: the state that belongs to a batch, errors, and an end that leaves nothing behind."""

import threading
import time

import pytest
from bigram import random_batch

from polygpt.errors import UserError
from polygpt.training import prefetch
from polygpt.training.prefetch import Prefetch


class Counting:
    """Batches whose iterator state is how many have been drawn, and so is the number of their only example."""

    def __init__(self, fail_at=None, error=None):
        self.drawn, self.fail_at, self.error, self.closed = 0, fail_at, error, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.drawn == self.fail_at:
            raise self.error
        self.drawn += 1
        return random_batch(seed=self.drawn)

    def get_state(self):
        return {"drawn": self.drawn}

    @property
    def last_examples(self):
        return (("counting", self.drawn, self.drawn),)

    def close(self):
        self.closed = True


def test_each_batch_comes_with_the_state_after_it_though_more_are_fetched_ahead():
    batches = Counting()
    feed = Prefetch(batches, put=lambda batch: batch, check=lambda batch: None, ahead=3)
    some = [feed.take() for _ in range(5)]
    assert [fed.state["drawn"] for fed in some] == [1, 2, 3, 4, 5]
    assert [fed.examples for fed in some] == [(("counting", n, n),) for n in range(1, 6)]
    deadline = time.monotonic() + 10
    while batches.drawn < 8 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert batches.drawn > 5
    assert feed.take().tokens == 8 * 6
    feed.close()
    assert batches.closed and not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_errors_of_the_iterator_and_of_the_check_reach_whoever_takes_the_batch():
    for error, message in ((ValueError("corrupt"), "corrupt"), (StopIteration(), "data ended")):
        feed = Prefetch(Counting(1, error), lambda batch: batch, lambda batch: None)
        assert feed.take().state == {"drawn": 1}
        with pytest.raises((ValueError, UserError), match=message):
            feed.take()
        feed.close()

    def refuse(batch):
        raise ValueError("no such token")

    feed = Prefetch(Counting(), lambda batch: batch, refuse)
    with pytest.raises(ValueError, match="no such token"):
        feed.take()
    feed.close()


def test_every_batch_is_checked():
    def refuse_the_third(batch):
        seen.append(batch)
        if len(seen) == 3:
            raise UserError("batch: a token outside [0, 8)")

    seen = []
    feed = Prefetch(Counting(), lambda batch: batch, refuse_the_third)
    assert [feed.take().state["drawn"] for _ in range(2)] == [1, 2]
    with pytest.raises(UserError, match="a token outside"):
        feed.take()
    feed.close()


def test_a_source_that_hangs_does_not_hold_up_the_end(monkeypatch, caplog):
    release, batches = threading.Event(), Counting()
    monkeypatch.setattr(prefetch, "GRACE", 0.2)
    monkeypatch.setattr(Counting, "__next__", lambda self: release.wait(30) and None)
    feed = Prefetch(batches, lambda batch: batch, lambda batch: None)
    begin = time.monotonic()
    feed.close()
    assert time.monotonic() - begin < 10 and not batches.closed
    assert "did not yield its next batch" in caplog.text
    release.set()
    feed._thread.join(10)
    assert not feed._thread.is_alive()


def test_whoever_waits_for_a_batch_can_be_stopped(monkeypatch):
    release, asked = threading.Event(), []
    monkeypatch.setattr(Counting, "__next__", lambda self: release.wait(30) and random_batch(seed=1))
    feed = Prefetch(Counting(), lambda batch: batch, lambda batch: None)
    assert feed.take(lambda: bool(asked) or asked.append(True)) is None, "asked twice, and no batch has come"
    release.set()
    assert feed.take().tokens == 8 * 6
    feed.close()
