"""The runner: what is there is never made again, what is made is kept, and one runner at a time."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
from tiny_runs import experiment

from own_ablation import POEM, write_ablation
from polygpt.ablation import results
from polygpt.ablation.engines.base import Engine, Failure, Progress
from polygpt.ablation.runner import Failed, Finished, Planned, run_all
from polygpt.ablation.study import Ablation, load_ablation
from polygpt.ablation.variants import grid
from polygpt.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_once")


@dataclasses.dataclass(frozen=True)
class MadeUp(Engine):
    """Trains nothing: a run's loss is its width plus a tenth of its seed, and its depth is a failure if it is `bad`."""

    bad: int = 0
    """A depth."""
    stop: int = 100
    """After so many tasks it is interrupted."""
    ran: ClassVar[list[tuple[str, tuple[int, ...]]]] = []

    def run(self, tasks, callback):
        for number, task in enumerate(reversed(tasks)):  # in whatever order
            if number == self.stop:
                raise KeyboardInterrupt
            if task.experiments[0].model.decoder.depth == self.bad:
                yield task, Failure("too deep", final=True)
                continue
            self.ran.append((task.name, task.seeds))
            callback(Progress(task.name, task.seeds, 1, 1, (0.0,)))
            yield (
                task,
                [
                    {
                        "seed": made.seed,
                        "metrics": {
                            "text/loss": made.model.decoder.width * made.optim.schedule.peak_lr + made.seed % 10 / 10
                        },
                        "diverged": False,
                    }
                    for made in task.experiments
                ],
            )


@pytest.fixture
def ran():
    MadeUp.ran.clear()
    return MadeUp.ran


def ablation(**settings) -> Ablation:
    settings = {"variants": {"base": {}, "deep": {"model.decoder.depth": 2}}, "seeds": 2} | settings
    return Ablation("Is deep better?", experiment(optim__schedule__peak_lr=1.0), **settings)


def test_all_seeds_of_a_point_are_a_task_and_nothing_is_made_again(tmp_path, ran):
    events = []
    found = run_all(ablation(), tmp_path, engine=MadeUp(), callback=events.append)
    assert sorted(ran) == [("base", (0, 1)), ("deep", (0, 1))]
    np.testing.assert_allclose(found.values["deep"], [16.0, 16.1])
    assert [type(event) for event in events] == [Planned, Progress, Finished, Progress, Finished]
    assert (events[0].stage, events[0].runs, events[0].done, len(events[0].tasks)) == ("comparison", 4, 0, 2)
    assert [record["seed"] for record in events[2].records] == [0, 1]

    ran.clear()
    again = run_all(ablation(), tmp_path, engine=MadeUp(), callback=events.append)
    assert ran == [] and (events[-1].runs, events[-1].done) == (4, 4)
    assert again.records == found.records


def test_more_seeds_are_the_only_ones_that_run(tmp_path, ran):
    run_all(ablation(), tmp_path, engine=MadeUp(), seeds=1)
    ran.clear()
    found = run_all(ablation(), tmp_path, engine=MadeUp(), seeds=3)
    assert sorted(ran) == [("base", (1, 2)), ("deep", (1, 2))]
    assert found.seeds == (0, 1, 2) and np.isfinite(found.values["base"]).all()


def test_a_variant_that_is_added_is_the_only_one_that_runs(tmp_path, ran):
    run_all(ablation(), tmp_path, engine=MadeUp())
    before = (tmp_path / "results.jsonl").read_bytes()
    ran.clear()
    more = {"wide": {"model.decoder.width": 32}, **ablation().variants}
    found = run_all(ablation(variants=more), tmp_path, engine=MadeUp())
    assert ran == [("wide", (0, 1))] and list(found.values) == ["wide", "base", "deep"]
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)


def test_what_nobody_asks_for_any_more_stays_and_is_not_read(tmp_path, ran):
    run_all(ablation(), tmp_path, engine=MadeUp())
    longer = ablation(variants={"base": {"train.steps": 13}})
    found = run_all(longer, tmp_path, engine=MadeUp())
    assert len(results.read(tmp_path / "results.jsonl")) == 6 and len(found.records) == 2
    ran.clear()
    run_all(ablation(), tmp_path, engine=MadeUp())
    assert ran == []


def test_points_that_are_one_experiment_share_their_runs(tmp_path, ran):
    events = []
    same = ablation(variants={"base": {}, "same": {"model.decoder.depth": 1}})
    found = run_all(same, tmp_path, engine=MadeUp(), callback=events.append)
    assert ran == [("base", (0, 1))] and len(results.read(tmp_path / "results.jsonl")) == 2
    np.testing.assert_array_equal(found.values["base"], found.values["same"])
    assert [(line["variant"], line["seed"]) for line in events[-1].records] == [
        ("base", 0),
        ("same", 0),
        ("base", 1),
        ("same", 1),
    ]


def test_tuning_comes_first_with_seeds_of_its_own(tmp_path, ran):
    tuned = ablation(tuned=grid("optim.schedule.peak_lr", 2.0, 0.5, 1.0), tuning_seeds=2)
    events = []
    found = run_all(tuned, tmp_path, engine=MadeUp(), callback=events.append)
    assert len(ran) == 8 and {seeds for _, seeds in ran[:6]} == {(1000, 1001)}
    assert sorted(ran[6:]) == [("base, tuned 0.5", (0, 1)), ("deep, tuned 0.5", (0, 1))]
    assert [event.stage for event in events if isinstance(event, Planned)] == ["tuning", "comparison"]
    np.testing.assert_allclose(found.values["base"], [8.0, 8.1])
    assert {(record["stage"], record["tuned"]) for record in found.records} == {("comparison", 0.5)}
    ran.clear()
    run_all(tuned, tmp_path, engine=MadeUp())
    assert ran == []


def test_a_task_that_fails_is_told_and_the_others_are_kept(tmp_path, ran):
    events = []
    with pytest.raises(UserError, match="^deep: too deep$"):
        run_all(ablation(), tmp_path, engine=MadeUp(bad=2), callback=events.append)
    assert [event.task.name for event in events if isinstance(event, Failed)] == ["deep"]
    assert ran == [("base", (0, 1))]
    run_all(ablation(), tmp_path, engine=MadeUp())
    assert ran == [("base", (0, 1)), ("deep", (0, 1))]


def test_an_unforeseen_failure_says_where_its_traceback_is(tmp_path):
    class Broken(Engine):
        def run(self, tasks, callback):
            for task in tasks:
                yield task, Failure("ValueError: broken", final=False, trace="Traceback: here")

    with pytest.raises(UserError, match=r"base: ValueError: broken: see .*error.txt \(2 of 2 tasks failed\)"):
        run_all(ablation(), tmp_path, engine=Broken())
    assert {path.read_text() for path in tmp_path.rglob("error.txt")} == {"Traceback: here"}


def test_interrupted_and_begun_again_it_is_the_same_table(tmp_path, ran):
    whole = run_all(ablation(), tmp_path / "whole", engine=MadeUp())
    with pytest.raises(KeyboardInterrupt):
        run_all(ablation(), tmp_path / "cut", engine=MadeUp(stop=1))
    path = tmp_path / "cut" / "results.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "torn')
    again = run_all(ablation(), tmp_path / "cut", engine=MadeUp())
    assert again.records == whole.records
    assert len(results.read(path)) == 4 and path.read_bytes().endswith(b"\n")


HOLDS = """
import pathlib, sys, time
from polygpt.runtime.lock import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_runner_is_told_who_the_first_is(tmp_path, ran):
    run_all(ablation(), tmp_path, engine=MadeUp(), seeds=1)
    command = [sys.executable, "-c", HOLDS, str(tmp_path / ".work")]
    other = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
    )
    try:
        assert other.stdout.readline() == "held\n"
        before = (tmp_path / "results.jsonl").read_bytes()
        with pytest.raises(UserError) as raised:
            run_all(ablation(), tmp_path, engine=MadeUp())
        holder = f"process {other.pid} (host {socket.gethostname()})"
        assert str(raised.value) == f"{tmp_path / '.work'} is in use by {holder}: wait until it ends"
        assert (tmp_path / "results.jsonl").read_bytes() == before
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    run_all(ablation(), tmp_path, engine=MadeUp())
    assert ran[-1][1] == (1,)


def test_what_is_under_way_is_hidden_from_git_and_removed_when_done(tmp_path):
    (tmp_path / "poem.txt").write_text(POEM)
    run_all(load_ablation(write_ablation(tmp_path)).replace(variants={"base": {}}, claims=()), tmp_path, seeds=1)
    assert (tmp_path / ".work" / ".gitignore").read_text() == "*\n"
    assert {path.name for path in (tmp_path / ".work").iterdir()} == {".gitignore", ".lock"}
    (record,) = results.read(tmp_path / "results.jsonl")
    assert list(record) == [
        *(
            "schema",
            "key",
            "variant",
            "at",
            "tuned",
            "stage",
            "seed",
            "metrics",
            "curve",
            "evaluations",
            "parameters",
            "flops",
        ),
        *("tokens", "steps", "seconds", "diverged", "how", "made"),
    ]
    assert record["how"] == "1 seed in one program" and json.dumps(record)
