"""What is seen of an ablation while it runs."""

import io
import time

import pytest
from rich.console import Console

from own_ablation import record, write_ablation
from polygpt.ablation import live as module
from polygpt.ablation.engines.base import Failure, Progress, Task
from polygpt.ablation.live import Live
from polygpt.ablation.runner import Failed, Finished, Planned
from polygpt.ablation.study import load_ablation, points

RATES = "over={'rate': grid('optim.schedule.peak_lr', 1e-3, 1e-2)},"


def ablation(tmp_path, more=""):
    return load_ablation(write_ablation(tmp_path, more))


def line(variant, seed, value, at=(), stage="comparison"):
    return {**record(seed, value), "key": f"{variant}{at}{seed}", "variant": variant, "at": dict(at), "stage": stage}


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def text_of(live) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(live.table())
    return console.file.getvalue()


def test_the_table_has_means_so_far_steps_and_the_time_left(tmp_path, clock):
    made = ablation(tmp_path)
    live = Live(made, 4, [line("base", seed, 2.0 + seed / 10) for seed in range(4)], Console(file=io.StringIO()))
    tasks = tuple(Task(point.name, (point.experiment,), tmp_path) for point in points(made))
    live(Planned("comparison", 12, 4, tasks[1:]))
    clock.now = 25.0
    live(Progress("wide", (0, 1, 2, 3), 1, 100, (1.0, 1.0, 1.0, 1.0)))
    assert live.left() is None, "most of these 25 s were not spent on steps"
    clock.now = 30.0
    live(Progress("wide", (0, 1, 2, 3), 2, 4, (1.0, 1.0, 1.0, 1.0)))
    assert live.left() == pytest.approx(30 / 2 * 6), "half of four runs took 30 s, six more are left"
    text = text_of(live)
    assert "4/4" in text and "2.15 ± 0.21" in text and "seeds 0-3, step 2/4" in text and "about 90 s left" in text
    clock.now = 60.0
    live(Finished(tuple(line("wide", seed, 1.9) for seed in range(4))))
    assert live.left() == pytest.approx(60.0)
    text = text_of(live)
    assert "1.90000 ± 0" in text and "step 2/4" not in text and "8/12 runs" in text and "about 60 s left" in text


def test_while_rates_are_tuned_the_comparison_is_still_to_come(tmp_path, clock):
    made = ablation(tmp_path)
    live = Live(made, 4, [line("base", seed, 2.0) for seed in range(4)], Console(file=io.StringIO()))
    tasks = tuple(Task(point.name, (point.experiment,), tmp_path) for point in points(made))
    live(Planned("tuning", 9, 3, tasks[1:]))
    clock.now = 10.0
    live(Progress("wide", (1000,), 4, 4, (1.0,)))
    assert live.left() == pytest.approx(10 * (5 + 2 * 4)), "five more to tune, then four seeds each of two variants"


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, clock):
    out = io.StringIO()
    made = ablation(tmp_path)
    with Live(made, 4, (), Console(file=out), seconds=10) as live:
        live(Planned("comparison", 12, 0, (Task("base", (made.base,), tmp_path),)))
        for step in range(1, 5):
            clock.now += 4
            live(Progress("base", (0, 1), step, 4, (2.0, float("nan"))))
        live(Finished((line("base", 0, 2.0), line("base", 1, 2.2))))
        live(Failed(Task("wide", (made.base,), tmp_path), Failure("OSError: no room", False)))
    lines = out.getvalue().splitlines()
    assert lines[0] == "comparison: 12 runs, 0 already done"
    assert lines[1].startswith("base: seeds 0, 1, step 3/4, loss 2; 0/12 runs done, ")
    assert lines[2].startswith("2/12 runs done, base, ")
    assert lines[3:] == ["wide failed: OSError: no room"], "one line for four steps of 4 s each"


def test_nothing_to_run_says_nothing(tmp_path):
    out = io.StringIO()
    with Live(ablation(tmp_path), 4, (), Console(file=out)) as live:
        live(Planned("comparison", 12, 12, ()))
    assert out.getvalue() == ""


def test_points_are_found_by_their_tasks_names(tmp_path):
    made = ablation(tmp_path, RATES + "\ntuned=grid('train.steps', 2, 4),")
    live = Live(made, 1, (), Console(file=io.StringIO()))
    live(Planned("tuning", 12, 0, ()))
    live(Progress("wide, rate 0.01, tuned 4", (1000,), 3, 4, (1.0,)))
    row = next(row for row in text_of(live).splitlines() if "step" in row)
    assert row.startswith("wide, rate 0.01") and "seed 1000, step 3/4" in row
    live(Finished((line("wide", 1000, 1.0, {"rate": 0.01}, "tuning"),)))
    text = text_of(live)
    assert "step" not in text and " 0/1 " in text and " 1/1 " not in text, (
        "runs that tune are no seeds of the comparison"
    )


def test_of_many_points_those_under_way_are_shown(tmp_path):
    rates = ", ".join(str(i / 1000) for i in range(1, 21))
    made = ablation(tmp_path, f"over={{'rate': grid('optim.schedule.peak_lr', {rates})}},")
    live = Live(made, 1, (), Console(file=io.StringIO()))
    live(Progress("deep_2, rate 0.02", (0,), 1, 4, (1.0,)))
    text = text_of(live)
    assert "deep_2, rate 0.02" in text and "and 30 more points" in text and len(text.splitlines()) == 32


def test_on_a_terminal_the_table_is_live_and_failures_stay(tmp_path):
    out = io.StringIO()
    made = ablation(tmp_path)
    with Live(made, 4, (), Console(file=out, force_terminal=True, width=100)) as live:
        live(Planned("comparison", 12, 0, (Task("base", (made.base,), tmp_path),)))
        live(Failed(Task("wide", (made.base,), tmp_path), Failure("OSError: no room", False)))
        live(Progress("base", (0,), 1, 4, (2.0,)))
        time.sleep(0.01)
    assert "wide failed: OSError: no room" in out.getvalue() and "seed 0, step 1/4" in out.getvalue()
