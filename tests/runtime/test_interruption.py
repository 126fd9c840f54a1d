"""A signal to one of several processes ends them all after the same step, however far apart they are."""

import io
import os
import random
import signal
import sys

import jax
import pytest

from polygpt.runtime import processes
from polygpt.runtime.interruption import Interruption


@pytest.mark.parametrize("seed", range(40))
def test_all_processes_end_after_the_same_step(monkeypatch, seed):
    rng = random.Random(seed)
    count, told = rng.randint(2, 5), {}
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(processes, "publish", lambda name, text: told.setdefault(name, text))
    monkeypatch.setattr(processes, "published", told.get)
    all_of_them = [Interruption() for _ in range(count)]
    for one in all_of_them:
        one._name = "stop"
    signals = {(rng.randrange(count), rng.randrange(1, 12)) for _ in range(rng.randint(1, 3))}
    begun, ended = [0] * count, [False] * count
    while not all(ended):
        # Before it begins step n + 2, a process has waited for step n, which all have to begin.
        ready = [i for i in range(count) if not ended[i] and begun[i] <= min(begun) + 1]
        i = rng.choices(ready, weights=[10**i for i in ready])[0]  # some are far slower than others
        all_of_them[i].requested |= (i, begun[i]) in signals
        if all_of_them[i].due(begun[i]):
            ended[i] = True
        else:
            begun[i] += 1
        assert max(begun) < 100
    assert len(set(begun)) == 1
    assert begun[0] <= min(step for _, step in signals) + 2


def test_one_process_alone_ends_at_once():
    alone = Interruption()
    assert not alone.due(3)
    alone.requested = True
    assert alone.due(3)


def test_a_signal_is_heard_where_nobody_listens(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    closed = io.TextIOWrapper(io.FileIO(write, "w", closefd=False))
    monkeypatch.setattr(sys, "stderr", closed)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.undo()
    os.close(write)
    assert interruption.requested
