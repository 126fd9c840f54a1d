"""`polygpt ablate` and `polygpt compare`, from the command to what is written."""

import json
import re
import shutil

import pytest

from own_ablation import record, write_ablation
from polygpt.ablation import index, readme
from polygpt.ablation.engines import inline
from polygpt.ablation.engines.base import Progress, Task

FOLDER = "experiments/ablations/own_width"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with one ablation, whose runs take no time; gives the tasks that were worked on."""
    worked = []

    def work(task_json, callback):
        task = Task.from_json(task_json)
        worked.append((task.name, task.seeds))
        callback(Progress(task.name, task.seeds, 4, 4, (1.0,) * len(task.seeds)))
        loss = {"base": 2.0, "wide": 1.9, "deep_2": 2.001}[task.name]
        of_seed = {seed: seed / 9 * (1 + loss / 1e4) + (seed * len(task.name)) % 3 / 999 for seed in task.seeds}
        return json.dumps([record(seed, loss + more) for seed, more in of_seed.items()])

    monkeypatch.setattr(inline, "work", work)
    monkeypatch.chdir(tmp_path)
    write_ablation(tmp_path / FOLDER)
    (tmp_path / "experiments" / "README.md").write_text("\n".join(index.MARKS))
    return worked


def test_what_is_missing_is_run_once_judged_and_written_up(polygpt, own, tmp_path):
    code, out, err = polygpt("ablate", "own_width")
    assert code == 0, err
    assert own == [("base", (0, 1, 2, 3)), ("wide", (0, 1, 2, 3)), ("deep_2", (0, 1, 2, 3))]
    assert "12 runs finished\n" in out and "12/12 runs done" in err
    assert re.search(r"wide < base +a wider .* held ", out)
    assert "2 of 3 claims held: a wider model learns more; depth makes no difference" in out
    assert "Budget: as many steps as the base (4)" in out
    folder = tmp_path / FOLDER
    assert readme.stale(folder) == [] and not index.stale(tmp_path / "experiments")
    assert "[own_width](ablations/own_width)" in (tmp_path / "experiments" / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, again, _ = polygpt("ablate", "own-width")
    assert code == 0 and len(own) == 3, "nothing was run"
    assert again == out.replace("12 runs finished", f"nothing to run: all 12 runs are in {FOLDER}/results.jsonl")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_seeds_may_be_added_and_variants_chosen(polygpt, own):
    code, out, err = polygpt("ablate", "own_width", "--only", "wide", "--seeds", "2", "--json")
    assert code == 0, err
    assert own == [("wide", (0, 1))] and json.loads(out)["made"] == 2
    assert [row["seeds"] for row in json.loads(out)["rows"]] == [0, 2, 0]
    done = json.loads(polygpt("ablate", "own_width", "--seeds", "5", "--json")[1])
    assert own[1:] == [("base", (0, 1, 2, 3, 4)), ("wide", (2, 3, 4)), ("deep_2", (0, 1, 2, 3, 4))]
    assert (done["runs"], done["made"], done["seeds"]) == (15, 13, [0, 1, 2, 3, 4])
    assert [claim["verdict"] for claim in done["claims"]] == ["held", "undecided", "held"]
    assert done["ablation"] == "own_width" and done["verdict"].startswith("2 of 3 claims held")


def test_a_file_anywhere_is_an_ablation(polygpt, own, tmp_path):
    write_ablation(tmp_path, name="mine.py")
    (tmp_path / "README.md").write_text("# Somebody's own\n")
    code, _, err = polygpt("ablate", "mine.py")
    assert code == 0, err
    assert (tmp_path / "mine" / "README.md").is_file() and (tmp_path / "mine" / "results.jsonl").is_file()
    assert (tmp_path / "README.md").read_text() == "# Somebody's own\n"


def test_ablations_are_listed_with_question_and_verdict(polygpt, own, tmp_path, monkeypatch):
    for words in (("ablate",), ("ablate", "--list")):
        code, out, _ = polygpt(*words)
        assert code == 0 and re.search(r"own_width +Is a wider model better, or a deeper one\? +not run yet", out)
    polygpt("ablate", "own_width")
    (entry,) = json.loads(polygpt("ablate", "--list", "--json")[1])["ablations"]
    assert entry["slug"] == "own_width" and entry["verdict"].startswith("2 of 3 claims held")
    assert entry["command"] == "polygpt ablate own_width"
    monkeypatch.chdir(tmp_path / "experiments")
    assert "no ablations in experiments/ablations" in polygpt("ablate")[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["own_widht"], "no ablation 'own_widht' in experiments/ablations: did you mean own_width"),
        (["own_width", "--only", "wid"], "--only wid: no such variant: did you mean wide"),
        (["own_width", "--seeds", "0"], "--seeds is 0: it must be at least 1"),
        (["own_width", "--engine", "proceses"], "no engine 'proceses': did you mean processes"),
        (["own_width", "--workers", "2"], "--engine inline has no workers"),
        (["own_width", "--slurm.minutes", "9"], "--slurm.minutes has no effect with --engine inline"),
        (
            ["own_width", "--engine", "slurm", "--slurm.minuts", "9"],
            "Slurm has no field 'minuts': did you mean minutes",
        ),
        (["own_width", "--engine", "processes", "--workers", "0"], "Processes.workers is 0: it must be"),
    ],
)
def test_mistakes_are_one_line_and_run_nothing(polygpt, own, words, expected):
    code, out, err = polygpt("ablate", *words)
    assert (code, own) == (2, []) and out == ""
    assert re.fullmatch(rf"polygpt: .*{re.escape(expected)}.*\n", err), err


def test_a_task_that_fails_is_code_2_and_the_others_are_kept(polygpt, own, monkeypatch, tmp_path):
    good = inline.work

    def work(task_json, callback):
        if Task.from_json(task_json).name == "wide":
            raise OSError("no room")
        return good(task_json, callback)

    monkeypatch.setattr(inline, "work", work)
    code, _, err = polygpt("ablate", "own_width")
    assert code == 2 and "polygpt: wide: OSError: no room" in err.splitlines()[-1]
    assert "wide failed: OSError: no room" in err
    monkeypatch.setattr(inline, "work", good)
    assert json.loads(polygpt("ablate", "own_width", "--json")[1])["made"] == 4


def test_help_lists_the_fields_of_all_engines(polygpt, own):
    code, out, _ = polygpt("ablate", "own_width", "--help")
    assert code == 0 and "--processes.workers null" in out and "--slurm.minutes 240" in out


@pytest.mark.slow
def test_an_ablation_is_trained(polygpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_ablation(tmp_path, "claims=(Claim('wide < base'),),", "mine.py")
    code, out, err = polygpt("ablate", "mine.py", "--seeds", "2", "--only", "base", "--only", "wide", "--json")
    assert code == 0, err
    done = json.loads(out)
    base, wide, deep = done["rows"]
    assert (base["seeds"], wide["seeds"], deep["seeds"]) == (2, 2, 0) and 0 < wide["mean"] < 10
    assert len((tmp_path / "mine" / "results.jsonl").read_text().splitlines()) == 4
    assert "made" in done and polygpt("ablate", "mine.py", "--seeds", "2", "--only", "base")[0] == 0


def test_finished_runs_are_compared(polygpt, trained, tmp_path):
    other = shutil.copytree(trained.run, tmp_path / "wider")
    config = json.loads((other / "config.json").read_text())
    config["model"]["decoder"]["width"] = 32
    (other / "config.json").write_text(json.dumps(config))
    code, out, err = polygpt("compare", trained.run, other)
    assert code == 0, err
    assert "Runs compared: own/loss" in out and re.search(r"model\.decoder\.width +16 +32", out)
    found = json.loads(polygpt("compare", trained.run, other, "--json", "--metric", "own/token_accuracy")[1])
    assert found["better"] == "higher" and found["differences"] == {"model.decoder.width": [16, 32]}
    assert [group["name"] for group in found["groups"]] == ["width 16", "width 32"]
    assert found["groups"][1]["compared"]["mean"] == 0 and found["groups"][1]["how"] == "paired"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "compare: nowhere alone: name at least two runs"),
        (["nowhere", "there"], "nowhere is not a run folder"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_of_compare_are_one_line(polygpt, words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = polygpt("compare", *words)
    assert (code, out) == (2, "") and expected in err and err.count("\n") == 1
