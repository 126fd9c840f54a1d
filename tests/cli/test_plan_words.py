"""What `polygpt plan` says while it compiles, and where it has no answer; nothing is compiled here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from polygpt.cli.plan import nothing_found
from polygpt.scale.plan import worker

TINY = str(Path(__file__).parents[1] / "scale" / "plan" / "tiny.py")
TIMED_OUT = {"failed": f"{worker.TIMED_OUT} 30 s"}
TOO_BIG = {"memory": None, "exhausted": {"all": 1e12}}


def found(*compiled):
    return SimpleNamespace(compiled=[SimpleNamespace(data=data) for data in compiled], trials=range(40))


@pytest.mark.parametrize(
    ("compiled", "budget", "said", "unsaid"),
    [
        (
            [TIMED_OUT, TIMED_OUT],
            60,
            ["no compilation finished in time (2 stopped", "--budget 780"],
            "smaller --data.batch_size",
        ),
        (
            [TIMED_OUT, TIMED_OUT],
            1000,
            ["a larger --budget than 1000 s, such as --budget 3000"],
            "smaller --data.batch_size",
        ),
        ([], 10, ["no compilation was started in time", "--budget 780"], "smaller --data.batch_size"),
        ([TOO_BIG, TOO_BIG], 60, ["none of 2 compiled candidates fits", "smaller --data.batch_size"], "--budget"),
        (
            [TOO_BIG, TIMED_OUT],
            60,
            ["none of 1 compiled candidate fits", "1 compilation did not finish in time", "--budget 780"],
            "no program",
        ),
        ([{"failed": "INTERNAL: a fault"}], 60, ["compilation failed: INTERNAL: a fault"], "--budget"),
    ],
)
def test_a_search_without_an_answer_says_what_helps(compiled, budget, said, unsaid):
    text = nothing_found(found(*compiled), budget)
    assert all(words in text for words in said) and unsaid not in text


def test_it_says_that_it_is_compiling_before_it_does(polygpt, capsys, monkeypatch):
    before = []

    def compiled(experiment, on, limit):
        before.append(capsys.readouterr().err)
        return {"failed": "it is only pretended"}

    monkeypatch.setattr(worker, "plan_in_subprocess", compiled)
    code, _, said = polygpt("plan", TINY, "--on", "cpu:1", "--train.mesh.tensor", "1")
    assert before == ["compiling tiny for cpu:1 ...\n"]
    assert code == 2 and "compilation failed: it is only pretended" in said


def test_a_phase_of_the_run_is_planned_by_its_number(polygpt, monkeypatch):
    planned = []
    monkeypatch.setattr(
        worker, "plan_in_subprocess", lambda given, *_: planned.append(given) or {"failed": "pretended"}
    )
    phase = {"class": "polygpt.training.phase:Phase", "start": 5, "changes": {"data.batch_size": 4}}
    given = "plan", TINY, "--on", "cpu:1", "--train.mesh.tensor", "1", "--train.phases", json.dumps([phase])
    for number, batch_size in ((0, 8), (1, 4)):
        said = polygpt(*given, "--phase", str(number))[2]
        assert planned[-1].data.batch_size == batch_size and f"phase {number} of 0 to 1" in said
    code, _, said = polygpt(*given, "--phase", "2")
    assert code == 2 and "--phase is 2: this run has the phases 0 to 1" in said


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("v5p-128", "64 chips are v5p:4x4x4; accepted for v5p are 2x2x1"),
        ("v5e", "no TPU slice is called 'v5e': accepted for v5e are 1x1, 2x2"),
        ("b200:8", "unknown chip: choose from v4, v5e, v5p, v6e, tpu7x, a100, h100, h200 and cpu"),
        ("h100", "write CHIP:SIZE"),
    ],
)
def test_a_target_that_is_not_known_is_translated_or_told_what_there_is(polygpt, on, said):
    code, _, told = polygpt("plan", TINY, "--on", on)
    assert code == 2 and said in told and told.count("\n") == 1
