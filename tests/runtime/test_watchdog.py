"""The watchdog: a run that hangs says where."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from polygpt.errors import SpecError
from polygpt.runtime import processes, watchdog
from polygpt.runtime.goodput import Goodput
from polygpt.runtime.watchdog import Watchdog, WatchdogSpec


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stacks(folder):
    return sorted(folder.glob("stacks-0-*.txt"))


class Clock(Goodput):
    """One that is set by hand."""

    def __init__(self):
        self.time = 0.0
        super().__init__(None)

    def now(self):
        return self.time


def test_a_step_may_take_a_multiple_of_the_median_and_other_things_have_their_own_patience(tmp_path):
    clock = Clock()
    spec = WatchdogSpec(factor=5, minimum=2, compile=100, checkpoint=200, evaluation=300)
    dog = Watchdog(spec, clock, tmp_path)
    clock.time = 7.0
    assert dog.stalled() == (7.0, 100.0), "starting up counts as compiling"
    with clock.track("compile"):
        clock.time = 57.0
        assert dog.stalled() == (50.0, 100.0)
    clock.switch("other")
    dog.step_finished(1)
    for step in range(2, 5):
        clock.time += 1.0 if step < 4 else 60.0
        dog.step_finished(step)
    clock.time += 4.0
    assert dog.stalled() == (4.0, 5.0), "the median of 1, 1 and 60"
    with clock.track("evaluation"):
        clock.time += 250.0
        assert dog.stalled() == (250.0, 300.0)
        dog.restart_timer()
    assert dog.stalled() == (0.0, 5.0)
    with clock.track("checkpoint"):
        assert dog.stalled()[1] == 200.0
    with clock.track("input_wait"):
        clock.time += 9.0
        assert dog.stalled() == (9.0, 5.0)


def test_what_hangs_is_named_with_the_step_the_activity_and_the_barrier(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "last_barrier", lambda: "passed barrier 'places in the data'")
    clock, release = Goodput(None), threading.Event()

    def a_source_that_hangs():
        with clock.track("input_wait"):
            release.wait(30)

    clock.switch("other")
    with Watchdog(WatchdogSpec(minimum=0.1), clock, tmp_path) as dog:
        dog.step_finished(17)
        thread = threading.Thread(target=a_source_that_hangs)
        thread.start()
        wait_for(lambda: stacks(tmp_path) and "a_source_that_hangs" in stacks(tmp_path)[0].read_text())
        release.set()
        thread.join()
    text = stacks(tmp_path)[0].read_text()
    assert "last step: 17" in text and "doing: waiting for input" in text
    assert "last barrier: passed barrier 'places in the data'" in text
    assert "a_source_that_hangs" in capsys.readouterr().err


def test_a_halt_is_reported_anew_when_it_has_lasted_twice_as_long(tmp_path, monkeypatch):
    clock, reports = Clock(), []
    clock.switch("other")
    dog = Watchdog(WatchdogSpec(minimum=1), clock, tmp_path)
    monkeypatch.setattr(dog, "_report", lambda seconds, patience: reports.append(seconds))
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    times = iter([0.5, 1.1, 1.9, 2.3, 4.0, 5.0])

    def wait(_):
        clock.time = next(times, None)
        return clock.time is None

    monkeypatch.setattr(dog._closing, "wait", wait)
    dog._watch()
    assert reports == [1.1, 2.3, 5.0]


def test_it_ends_the_process_though_nobody_reads_what_it_says(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

    left = []
    monkeypatch.setattr(watchdog, "exit_now", left.append)
    dog = Watchdog(WatchdogSpec(action="exit"), Clock(), tmp_path)
    dog._goodput.switch("other")
    monkeypatch.setattr(watchdog.sys, "stderr", Closed())
    dog._report(9.0, 5.0)
    monkeypatch.undo()
    assert left == [1] and "process 0" in stacks(tmp_path)[0].read_text()


HANGING = """
import sys, time
sys.path.insert(0, {tests!r})
from tiny_experiment import experiment
from polygpt.overrides import override
from polygpt.training.loop import train
from polygpt.training.loggers import Silent
from polygpt.runtime.watchdog import WatchdogSpec

class Hangs(Silent):
    def step(self, step, loss):
        if step == 3:
            self.sleep_for_ever()

    def sleep_for_ever(self):
        time.sleep(600)

chosen = override(experiment(), {{"model.decoder.depth": "0", "train.evaluate_every": "null"}})
dog = WatchdogSpec(factor=2.0, minimum=4.0, action="exit")
train(chosen.replace(train=chosen.train.replace(watchdog=dog)), sys.argv[1], lambda *_: [Hangs()])
"""


@pytest.mark.slow
def test_a_sink_that_hangs_ends_the_process_where_that_is_asked_for(tmp_path):
    script = HANGING.format(tests=str(Path(__file__).parents[1] / "training"))
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (place,) = stacks(tmp_path)
    text = place.read_text()
    assert "sleep_for_ever" in text and "doing: logging" in text and "last step: 3" in text
    assert "sleep_for_ever" in done.stderr


@pytest.mark.parametrize("field", ["factor", "minimum", "compile", "checkpoint", "evaluation"])
def test_settings_that_make_no_sense_are_refused(field):
    with pytest.raises(SpecError, match=f"WatchdogSpec.{field} is 0.0"):
        WatchdogSpec(**{field: 0.0})
