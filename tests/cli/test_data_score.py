"""`polygpt data score`: a run learns from cached log-probabilities; what does not fit is refused in one line."""

import json

import pytest

from polygpt.cli.main import main

pytestmark = pytest.mark.usefixtures("compiled_once")
SOFT = {"soft": ["polygpt.objectives.top_k_distillation:TopKDistillation", 1.0]}


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Scores of the run's own data."""
    folder = tmp_path_factory.mktemp("scores") / "own"
    assert main(["data", "score", str(trained.file), str(trained.run), "--out", str(folder), "--top", "4"]) == 0
    return folder


def test_scores_are_written_and_learned_from(polygpt, trained, folder, tmp_path):
    words = ["data", "score", trained.file, trained.run, "--out", tmp_path / "scores", "--top", 4, "--json"]
    code, out, err = polygpt(*words)
    assert code == 0, err
    found = json.loads(out)
    assert found["examples"] == 7 and found["skipped"] == 0 and "read them with --data.scores '" in err
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "scores" / path.name).read_bytes()
    of_a_run = ["data", "score", trained.run, trained.run, "--out", tmp_path / "again", "--top", 4, "--phase", 0]
    assert polygpt(*of_a_run)[0] == 0, "its own data"
    for path in folder.glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    train = [
        "train",
        trained.file,
        "--workdir",
        tmp_path / "run",
        "--objectives",
        json.dumps(SOFT),
        "--no-report",
        "--json",
    ]
    code, out, err = polygpt(*train)
    assert code == 2 and "objectives.soft reads the scores 'teacher': add their folder" in err and err.count("\n") == 1
    code, out, err = polygpt(*train, "--data.scores", json.dumps({"teacher": str(folder)}))
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/soft"] for line in lines if "loss/soft" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top", 3], "has scores with another top (4, now 3): name another folder"),
        (["--top", -1, "--out", "new"], "--top is -1: it must be from 0"),
        (["--batch-size", 0, "--out", "new"], "--batch-size is 0: it must be at least 1"),
        (
            ["--out", "new", "--data.tasks.own.transform", '["polygpt.data.transforms.word_swap:WordSwap"]'],
            "in every epoch",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(polygpt, trained, folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = words if "--out" in words else [*words, "--out", folder]
    code, _, err = polygpt("data", "score", trained.file, trained.run, *words)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_check_of_the_data_finds_scores_that_are_not_theirs(polygpt, trained, folder, tmp_path):
    words = ["data", "check", trained.file, "--json", "--data.scores", json.dumps({"teacher": str(folder)})]
    code, out, err = polygpt(*words)
    assert code == 0 and json.loads(out)["scores"] == [], err
    code, out, err = polygpt(*words, "--data.tasks.own.prompt_weight", "1")
    assert code == 0, "nothing of these examples is a prompt"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (records,) = (path for path in tmp_path.glob("*.npy") if "index" not in path.name)
    records.write_bytes(records.read_bytes()[:-4])
    code, out, err = polygpt(*words[:-1], json.dumps({"teacher": str(tmp_path)}))
    assert code == 2 and "data check: the scores of 1 example cannot be used" in err
    (fault,) = json.loads(out)["scores"]
    assert records.name in fault and fault in err
    phase = {"class": "polygpt.training.phase:Phase", "start": 1}
    later = [phase | {"changes": {"optim.schedule.peak_lr": 1e-3}}, phase | {"start": 2}]
    later[1]["changes"] = {"data.scores": {"teacher": str(tmp_path)}}
    code, out, err = polygpt(*words, "--train.phases", json.dumps(later))
    assert code == 2 and json.loads(out)["scores"] == [fault], "a later phase reads other scores"


def test_damaged_and_foreign_scores_stop_training_with_one_line(polygpt, trained, folder, tmp_path):
    train = ["train", trained.file, "--objectives", json.dumps(SOFT), "--no-report", "--workdir", tmp_path / "run"]
    for name, damage, message in (
        (
            "manifest",
            lambda path: (path / "scores.json").write_text("{}"),
            "scores.json is damaged, or of another version",
        ),
        ("foreign", lambda path: None, "the scores are of another tokenizer"),
        (
            "records",
            lambda path: [one.write_bytes(b"") for one in path.glob("*0.npy")],
            "are damaged: remove them and run",
        ),
    ):
        copy = tmp_path / name
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        damage(copy)
        words = ["--tokenizer.multiple", "64"] if name == "foreign" else []
        code, _, err = polygpt(*train, "--data.scores", json.dumps({"teacher": str(copy)}), *words)
        assert code == 2 and message in err, err
