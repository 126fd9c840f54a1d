"""The code in the READMEs of these folders runs as it stands."""

import re

import pytest

from polygpt.ablation.provenance import PACKAGE


@pytest.mark.parametrize("folder", ["ablation", "evaluation"])
def test_the_example_runs_and_the_page_is_short(folder, tmp_path):
    text = (PACKAGE / folder / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(block, f"{folder}/README.md", "exec"), {"__name__": "readme"})
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize("folder", ["ablation", "evaluation"])
def test_every_file_of_the_folder_is_named(folder):
    text = (PACKAGE / folder / "README.md").read_text()
    files = [path.name for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py"]
    assert [name for name in files if f"`{name}`" not in text] == []
