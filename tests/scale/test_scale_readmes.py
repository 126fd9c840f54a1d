"""The READMEs of scale/ and report/: short, their examples run, their links lead somewhere."""

import re
from pathlib import Path

import pytest

import polygpt

ROOT = Path(polygpt.__file__).parent
FOLDERS = ("scale", "scale/plan", "scale/launch", "report")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_example_of_a_folder_runs(folder, monkeypatch):
    text = (ROOT / folder / "README.md").read_text()
    assert text.count("\n") <= 60
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # put back afterwards: an example sets it
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, folder, "exec"), {})


@pytest.mark.parametrize("name", [*(f"{folder}/README.md" for folder in FOLDERS), "scale/PLANNER.md"])
def test_links_and_files_exist(name):
    file = ROOT / name
    text = file.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (file.parent / link).exists(), link
    for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        for path in re.findall(r"`([\w/]+(?:\.py|/))`", row):
            assert (file.parent / path).exists(), path
