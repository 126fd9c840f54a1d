"""The README's files and commands, run as written (with few steps where the run itself is not the point)."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from polygpt.cli.main import main

README = Path(__file__).parents[1] / "README.md"
QUICK = ["--train.steps", "2", "--train.evaluate_every", "null", "--data.rows", "2", "--no-report", "--json"]
SHALLOW = ["--model.decoder.depth", "1", "--model.adapters.audio.tower.depth", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every Python file that the README shows, under the name in its first line, and some media."""
    folder = tmp_path_factory.mktemp("readme")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README.read_text(), re.DOTALL):
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
    """The README's `polygpt` commands that name `file`, split into words."""
    lines = re.findall(r"^polygpt (.*?)(?:  +#.*)?$", README.read_text(), re.MULTILINE)
    return [line.split() for line in lines if file in line.split() or f"{file.removesuffix('.py')}" in line]


def run(monkeypatch, folder: Path, words: list[str]) -> dict:
    """The JSON object that a successful command prints."""
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(words)
    assert code == 0, words
    return json.loads(out.getvalue())


def test_a_folder_of_media_trains_evaluates_and_generates(monkeypatch, folder):
    small = ["--data.rows", "2", "--evaluation.rows", "2", "--evaluation.sampling.max_tokens", "4"]
    small += ["--data.layout.length", "128", "--model.decoder.depth", "1"]
    check, show, train, evaluate, generate, deeper = commands("mine.py")[:6]
    assert run(monkeypatch, folder, [*check, "--json"])["fault"] is None
    run(monkeypatch, folder, [*show, "--json"])
    assert run(monkeypatch, folder, [*train, *small, "--train.steps", "2", "--json"])["step"] == 2
    assert run(monkeypatch, folder, [*evaluate, "--json"])["tasks"]["mine"]["n"] == 2
    assert "text" in run(monkeypatch, folder, [*generate, "--max_tokens", "4", "--json"])
    assert "--model.decoder.depth" in deeper


def test_an_attention_variant_of_ones_own_trains_by_name(monkeypatch, folder):
    (words,) = commands("sliding.py")
    quickstart = str(README.parent / "experiments" / "quickstart.py")
    words = [quickstart if word == "experiments/quickstart.py" else word for word in words]
    assert run(monkeypatch, folder, [*words, *QUICK, *SHALLOW])["step"] == 2
    config = json.loads((folder / "runs" / "sliding" / "config.json").read_text())
    attention = config["model"]["decoder"]["attention"]
    assert attention["class"].endswith("sliding.py:SlidingWindow") and attention["window"] == 32
    assert attention["heads"] == 4, "fields that both variants have are kept"


def test_a_dataset_a_modality_and_a_loss_of_ones_own_learn(monkeypatch, folder):
    (words,) = commands("quadrants.py")
    result = run(monkeypatch, folder, [*words, "--json"])
    assert result["tasks"]["quadrants"]["accuracy"] > 0.9
    assert result["modality_gain"]["quadrants/point"]["low"] > 0


def test_the_map_names_every_folder_and_nothing_else():
    package = README.parent / "research" / "polygpt"
    section = README.read_text().split("## The map")[1].split("##")[0]
    named = {name for name in re.findall(r"^ {6,8}(\w+(?:/|\.py))", section, re.MULTILINE)}
    real = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    real |= {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    assert named - {"embedded/"} == real
