"""The files and commands of the README and its pages, run as written, with few steps where that suffices."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from polygpt.cli.main import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGE = ROOT / "research" / "polygpt"
PAGES = (
    README,
    PACKAGE / "adapters" / "QUADRANTS.md",
    PACKAGE / "attention" / "VARIANTS.md",
    PACKAGE / "objectives" / "OBJECTIVES.md",
    PACKAGE / "optim" / "MUP.md",
)
"""The pages whose files and commands belong together."""
TEXT = "\n".join(page.read_text() for page in PAGES)
QUICK = ["--train.steps", "2", "--train.evaluate_every", "null", "--data.batch_size", "2", "--no-report", "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every Python file that the README shows, under the name in its first line, and some media."""
    folder = tmp_path_factory.mktemp("readme")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL):
        (folder / name).write_text(code)
    for split in ("train", "test"):
        media = folder / "media" / split
        media.mkdir(parents=True)
        Image.new("RGB", (40, 30), "grey").save(media / "heron.jpg")
        soundfile.write(media / "call.wav", np.sin(np.arange(8000) / 5) / 3, 16_000)
        rows = [
            {"file_name": "heron.jpg", "text": "a grey heron"},
            {"file_name": "call.wav", "text": "all lines are busy"},
        ]
        (media / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def commands(file: str) -> list[list[str]]:
    """The `polygpt` commands that name `file`, split into words."""
    lines = re.findall(r"^polygpt (.*?)(?:  +#.*)?$", TEXT, re.MULTILINE)
    return [shlex.split(line) for line in lines if file in line.split() or f"{file.removesuffix('.py')}" in line]


def run(monkeypatch, folder: Path, words: list[str]) -> dict:
    """The JSON object that a successful command prints."""
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(words)
    assert code == 0, words
    return json.loads(out.getvalue())


@pytest.mark.slow
def test_a_folder_of_media_trains_evaluates_and_generates(monkeypatch, folder):
    small = ["--data.batch_size", "2", "--evaluation.batch_size", "2", "--evaluation.sampling.max_tokens", "4"]
    small += ["--data.layout.seq_len", "128", "--model.decoder.depth", "1"]
    check, show, train, evaluate, generate, deeper = commands("mine.py")[:6]
    assert run(monkeypatch, folder, [*check, "--json"])["fault"] is None
    run(monkeypatch, folder, [*show, "--json"])
    assert run(monkeypatch, folder, [*train, *small, "--train.steps", "2", "--json"])["step"] == 2
    assert run(monkeypatch, folder, [*evaluate, "--json"])["tasks"]["mine"]["n"] == 2
    assert "text" in run(monkeypatch, folder, [*generate, "--max_tokens", "4", "--json"])
    assert "--model.decoder.depth" in deeper
    script = (folder / "from_python.py").read_text()
    assert 'pg.train(experiment(), "runs/mine")' in script
    monkeypatch.setattr(
        "polygpt.training.loop.train", lambda experiment, workdir: None
    )  # the run above is what it opens
    monkeypatch.syspath_prepend(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(script, "from_python.py", "exec"), {})
    assert "'n': 2" in out.getvalue()


@pytest.mark.slow
def test_a_wide_model_has_a_narrow_one_as_its_base(monkeypatch, folder):
    small = [
        "--data.batch_size",
        "2",
        "--data.layout.seq_len",
        "128",
        "--model.decoder.depth",
        "1",
        "--train.steps",
        "2",
    ]
    for words in [words for words in commands("mine.py") if words[-1] in ("runs/narrow", "runs/wide")]:
        run(monkeypatch, folder, [*words, *small, "--no-report", "--json"])
    models = [json.loads((folder / "runs" / name / "config.json").read_text())["model"] for name in ("narrow", "wide")]
    assert models[0]["mup"] is None and models[0]["decoder"]["width"] == models[1]["mup"]["base"]["decoder.width"]
    assert models[1]["decoder"]["width"] == 512


@pytest.mark.slow
def test_an_attention_of_ones_own_is_checked_drawn_measured_and_compared(monkeypatch, folder):
    check, show, bench, baseline, ablation = tutorial(README, "## Your own attention")
    (hybrid,) = tutorial(PAGES[2], "Blocks of one model")
    lines = (folder / "near_first.py").read_text().splitlines()
    prose = [line for line in lines if not line or line.lstrip().startswith(('"""', "import"))]
    assert len(lines) - len(prose) <= 20
    findings = {
        one["name"]: one["passed"] for one in run(monkeypatch, folder, [*check, "--no-tpu", "--json"])["findings"]
    }
    assert all(passed is not False for passed in findings.values()) and sum(map(bool, findings.values())) >= 19
    assert run(monkeypatch, folder, [*show, "--json"])["blocks"]["map"]["empty"] > 0
    costs = run(monkeypatch, folder, [*bench, "--lengths", "16,32", "--model_width", "32", "--json"])["costs"]
    assert {cost["variant"] for cost in costs} == {"NearFirst", "MultiHead"}
    for words in (baseline, ablation, hybrid):
        assert run(monkeypatch, folder, [*words, *QUICK, "--model.adapters.audio.tower.depth", "0"])["step"] == 2
    configs = {
        name: json.loads((folder / "runs" / name / "config.json").read_text()) for name in ("mha", "near", "hybrid")
    }
    plain, own = (configs[name]["model"]["decoder"].pop("attention") for name in ("mha", "near"))
    assert configs["mha"] == configs["near"], "one field changed"
    assert plain["class"].endswith(":MultiHead") and own["class"].endswith("near_first.py:NearFirst")
    assert own["heads"] == plain["heads"] == 4 and own["window"] == 32, "fields that both variants have are kept"
    assert configs["hybrid"]["model"]["decoder"]["pattern"][1]["class"].endswith(":Mamba2")


def tutorial(page: Path, title: str) -> list[list[str]]:
    """The commands of a section, with the quickstart's own path."""
    section = page.read_text().split(title)[1].split("\n## ")[0]
    quickstart = str(README.parent / "experiments" / "quickstart.py")
    lines = re.findall(r"^polygpt (.*?)(?:  +#.*)?$", section, re.MULTILINE)
    return [
        [quickstart if word == "experiments/quickstart.py" else word for word in shlex.split(line)] for line in lines
    ]


@pytest.mark.slow
def test_an_objective_of_ones_own_is_checked_and_trains(monkeypatch, folder):
    check, train = tutorial(PAGES[3], "## Your own objective")
    lines = (folder / "poly_loss.py").read_text().splitlines()
    assert len(lines) <= 20
    findings = run(monkeypatch, folder, [*check, "--json"])["findings"]
    assert len(findings) == 23 and sum(one["passed"] is True for one in findings) >= 18
    assert run(monkeypatch, folder, [*train, *QUICK, "--model.adapters.audio.tower.depth", "0"])["step"] == 2


@pytest.mark.slow
def test_the_tutorial_checks_its_variant_for_a_tpu_too(monkeypatch, folder):
    check = tutorial(README, "## Your own attention")[0]
    result = run(monkeypatch, folder, [*check, "--only", "compiles for TPU", "--json"])
    assert result["fault"] is None


@pytest.mark.parametrize("page", PAGES[2:4], ids=lambda page: page.stem)
def test_a_table_is_what_the_command_prints(page):
    from polygpt.lab import catalogue
    from polygpt.lab.objective import catalogue as of_objectives

    if page.stem == "VARIANTS":
        table = catalogue.markdown([catalogue.entry(cls) for cls in catalogue.variants()])
    else:
        table = of_objectives.markdown([of_objectives.entry(cls) for cls in of_objectives.objectives()])
    print(table)
    rows, lines = table.splitlines(), page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(rows[0]))
    assert lines[start + len(rows)] == "", "nothing that is gone"
    for line, row in zip(lines[start:], rows, strict=False):
        assert line.startswith(row), "polygpt ... list --markdown; one column follows, see tests/lab/test_every_*.py"


@pytest.mark.slow
def test_a_dataset_a_modality_and_a_loss_of_ones_own_learn(monkeypatch, folder):
    (words,) = commands("quadrants.py")
    result = run(monkeypatch, folder, [*words, "--json"])
    assert result["tasks"]["quadrants"]["accuracy"] > 0.9
    assert result["modality_gain"]["quadrants/point"]["low"] > 0


@pytest.mark.slow
def test_an_ablation_is_one_file(monkeypatch, folder):
    file = folder / "gates.py"
    whole = file.read_text()
    small = whole.replace("steps=300", "steps=2").replace("limit=200", "limit=4").replace("warmup=20", "warmup=0")
    file.write_text(small.replace("batch_size=16", "batch_size=2").replace("depth=2", "depth=1"))
    words, more = commands("gates.py")
    done = run(monkeypatch, folder, [*words, "--seeds", "2", "--json"])
    assert done["made"] == 8 and [row["variant"] for row in done["rows"]] == ["gelu", "geglu"]
    assert [claim["claim"] for claim in done["claims"]] == ["geglu < gelu", "abs(geglu - gelu) < noise"]
    assert "**Verdict.**" in (folder / "gates" / "README.md").read_text()
    assert run(monkeypatch, folder, [*words, "--seeds", "2", "--json"])["made"] == 0, "all is there"
    assert more == [*words, "--seeds", "8", "--engine", "processes"]


def test_the_map_names_every_folder_and_nothing_else():
    named = set(re.findall(r"^\| [\[`]?(\w+(?:/|\.py))", (PACKAGE / "README.md").read_text(), re.MULTILINE))
    real = {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    real |= {path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    assert named == real
