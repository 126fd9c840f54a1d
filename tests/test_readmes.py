"""Every page of documentation: short READMEs, examples that run, links and files that exist."""

import json
import re
from pathlib import Path

import pytest

from polygpt.cli.main import main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "research" / "polygpt"
FOLDERS = sorted(
    path
    for path in PACKAGE.rglob("*")
    if path.is_dir() and not {"__pycache__", "embedded"} & set(path.parts) and any(path.iterdir())
)
WITHOUT_EXAMPLE = (PACKAGE / "report" / "assets",)
"""Folders without Python."""
PAGES = sorted(page for top in ("research", "experiments") for page in (ROOT / top).rglob("*.md"))
PAGES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_top_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_a_readme_is_short_and_names_every_file_of_its_folder(folder):
    text = (folder / "README.md").read_text()
    assert len(text.splitlines()) <= 60
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    if "one file per" not in text.lower():  # a catalogue: the table would be as long as the folder
        assert [name for name in files if f"`{name}`" not in text] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_the_examples_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # put back afterwards: an example sets it
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    text = (folder / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks or folder in WITHOUT_EXAMPLE
    for block in blocks:
        exec(compile(block, f"{named(folder)}/README.md", "exec"), {"__name__": "readme"})


EXPERIMENTS = {
    name: (code, command)
    for folder in FOLDERS
    for text in [(folder / "README.md").read_text()]
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for command in re.findall(rf"`polygpt (train {re.escape(name)}.*?)`", text)
}
"""The experiment files in READMEs with the commands that train them."""


def test_objectives_and_sources_are_shown_in_an_experiment():
    assert {"confident.py", "sums.py"} <= set(EXPERIMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains_by_its_command(name, tmp_path, monkeypatch, capsys):
    code, command = EXPERIMENTS[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(code)
    small = ["--train.steps", "2", "--data.batch_size", "2", "--model.decoder.depth", "1"]
    assert main([*command.split(), *small, "--json"]) == 0
    (line, *_) = Path(json.loads(capsys.readouterr().out)["workdir"], "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] != 0


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_the_files_that_a_table_names_exist(folder):
    rows = re.findall(r"^\| (`.*?) \|", (folder / "README.md").read_text(), re.MULTILINE)
    files = [path for row in rows for path in re.findall(r"`([\w/]+(?:\.py|/))`", row)]
    assert [path for path in files if not (folder / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#: ]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
