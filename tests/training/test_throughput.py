"""Throughput: what is waited for counts when it is waited for."""

import pytest

from polygpt.training import throughput
from polygpt.training.prefetch import Fed
from polygpt.training.throughput import Throughput


def test_waiting_before_a_restart_does_not_count_after_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    fed, counted = Fed(None, {}, (), tokens=10), Throughput(2)
    counted.finished(fed)  # the first step, which compiles
    now[0] += 9.0
    counted.waited(9.0)  # for the batch of the second step; then the first step's metrics are told
    counted.restart()
    now[0] += 1.0
    counted.waited(0.25)
    counted.finished(fed)
    assert counted.timing() == pytest.approx({"seconds": 1.0, "tokens_per_second": 20.0, "input_wait": 0.25})
