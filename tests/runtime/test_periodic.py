"""Something every few minutes, at the same step in all processes."""

import itertools

import jax
import pytest

from polygpt.runtime import periodic, processes
from polygpt.runtime.periodic import Periodic


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def test_alone_it_is_due_when_the_minutes_are_over_and_again_after_as_many():
    clock = Clock()
    every = Periodic(2.0, clock)
    due = []
    for step in range(1, 11):
        clock.seconds += 50
        if every.due(step):
            due.append(step)
            every.restart()
    assert due == [3, 6, 9], "120 seconds are over at 150, and 120 after that at 300"


def test_it_is_never_due_without_minutes():
    clock = Clock()
    every = Periodic(None, clock)
    clock.seconds = 1e9
    assert not every.due(4)


@pytest.mark.parametrize("order", list(itertools.permutations((-2, 0, 2))), ids=str)
def test_all_processes_take_the_same_step_though_one_is_two_steps_ahead(monkeypatch, order):
    """Three processes, in every order that two steps of difference allow; the clock of the first alone counts."""
    told, rank, now = {}, 0, 0
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: rank)
    monkeypatch.setattr(processes, "publish", lambda name, text: told.setdefault(name, text))
    monkeypatch.setattr(processes, "published", lambda name: told.get(name))
    made = []
    for _ in range(3):
        monkeypatch.setattr(periodic, "_made", itertools.count(7))  # each process counts for itself
        made.append(Periodic(1.0, lambda: now))
    due = [[], [], []]
    for n in range(-2, 200):
        now = 6.0 * n
        for rank in range(3):  # process `rank` is order[rank] steps ahead of the middle
            begun = n + order[rank]
            if 1 <= begun <= 195 and made[rank].due(begun):
                due[rank].append(begun)
                made[rank].restart()
    assert due[0] == due[1] == due[2] and len(due[0]) > 10
    assert all(4 <= later - before <= 20 for before, later in itertools.pairwise(due[0]))
