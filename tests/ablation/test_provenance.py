"""Which source of the library a run imported: what counts, what does not, and what is said of mixtures."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_runs import experiment

from own_ablation import CODE, write_ablation, write_results
from polygpt.ablation import provenance, readme
from polygpt.ablation.results import RESULTS, append, read
from polygpt.ablation.runner import run_all
from polygpt.ablation.study import load_ablation
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.sliding import SlidingWindow
from polygpt.errors import UserError


@pytest.fixture
def forget():
    """Sources are read anew before and after."""
    cached = (provenance._closure, provenance._read, provenance._file, provenance.commit)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch, forget):
    """A library of a few files; gives a function that writes one and says what a run's code then is."""
    place = tmp_path / "polygpt"
    monkeypatch.setattr(provenance, "PACKAGE", place)
    files = {
        "ablation/seeds.py": "from polygpt import loop\nfrom polygpt.ablation import tables\n",
        "ablation/tables.py": "import polygpt.drawing\n",
        "attention/sliding.py": "from polygpt.attention.multi_head import head\n",
        "attention/multi_head.py": "def head():\n    return 1\n",
        "loop.py": "def train():\n    from polygpt.deep import inner\n    return inner.x\n",
        "deep/inner.py": "x = 1\n",
        "drawing.py": "colour = 'red'\n",
        "unused.py": "y = 1\n",
    }
    for folder in ("", "ablation", "attention", "deep"):
        (place / folder).mkdir(parents=True, exist_ok=True)
        (place / folder / "__init__.py").write_text("")
    for name, text in files.items():
        (place / name).write_text(text)

    def code(name="unused.py", text="y = 1\n", newline="\n"):
        (place / name).write_text(text, newline=newline)
        for cached in (provenance._closure, provenance._read, provenance._file):
            cached.cache_clear()
        return provenance.of(experiment(model__decoder__attention=SlidingWindow(heads=2)))

    return code


def test_what_runs_and_what_its_classes_import_counts_and_nothing_else(package):
    before = package()
    assert set(before["more"]) >= {"polygpt.attention.sliding", "polygpt.attention.multi_head"}
    assert package("unused.py", "y = 2\n") == before
    assert package("ablation/tables.py", "z = 2\n") == before and package("drawing.py", "colour = 2\n") == before
    deep = package("deep/inner.py", "x = 2\n")
    assert deep["core"] != before["core"] and deep["more"] == before["more"]
    head = package("attention/multi_head.py", "def head():\n    return 2\n")
    assert head["core"] == deep["core"]
    assert {name for name in head["more"] if head["more"][name] != deep["more"][name]} == {
        "polygpt.attention.multi_head"
    }


@pytest.mark.parametrize(
    "text",
    [
        "x = 1  # one\n",
        '"""Says something."""\n\n\n# a comment\nx = 1\n"""Of one."""\n',
        "x = 1   \n\n",
    ],
)
def test_comments_docstrings_blank_lines_and_line_ends_do_not_count(package, text):
    before = package("deep/inner.py", "x = 1\n")
    assert package("deep/inner.py", text) == before
    assert package("deep/inner.py", text, newline="\r\n") == before
    assert package("deep/inner.py", "x = '# one'\n") != package("deep/inner.py", "x = '# two'\n")


def test_the_place_of_the_package_does_not_count(package, tmp_path, monkeypatch):
    before = package()
    shutil.copytree(tmp_path / "polygpt", tmp_path / "elsewhere")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "elsewhere")
    for cached in (provenance._closure, provenance._read, provenance._file):
        cached.cache_clear()
    assert provenance.of(experiment(model__decoder__attention=SlidingWindow(heads=2))) == before


def test_the_real_core_trains_and_evaluates_and_variants_add_their_own_modules():
    core = provenance._closure(provenance.ROOTS)
    assert {"polygpt.training.step", "polygpt.evaluation.likelihood", "polygpt.ablation.seeds"} <= set(core)
    assert not [name for name in core if name.startswith(("polygpt.cli", "polygpt.report", "polygpt.ablation.claims"))]
    kinds = MultiHead(2), SlidingWindow(2)
    whole, near = (provenance.of(experiment(model__decoder__attention=kind)) for kind in kinds)
    assert whole["core"] == near["core"]
    assert "polygpt.attention.sliding" in near["more"] and "polygpt.attention.sliding" not in whole["more"]


def git(folder, *words):
    own = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", str(folder), *own, *words], check=True, capture_output=True, text=True).stdout


def test_a_commit_is_dirty_where_the_library_changed_and_not_where_results_did(tmp_path, monkeypatch, forget):
    place = tmp_path / "research" / "polygpt"
    place.mkdir(parents=True)
    monkeypatch.setattr(provenance, "PACKAGE", place)
    (place / "__init__.py").write_text("")

    def commit():
        provenance.commit.cache_clear()
        return provenance.commit()

    assert commit() is None
    git(tmp_path, "init", "-q")
    assert commit() is None, "it is not under version control"
    git(tmp_path, "add", "research")
    git(tmp_path, "commit", "-qm", "First")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert commit() == head
    (tmp_path / "results.jsonl").write_text("{}")
    assert commit() == head
    (place / "new.py").write_text("")
    assert commit() == f"{head}-dirty"


# --- what is said -----------------------------------------------------------------------------------------------------


def made(core="a" * 32, commit="c" * 40, more=None, code=True):
    return {"commit": commit, "code": {"core": core, "more": more or {}} if code else None}


def test_runs_of_one_committed_source_have_no_faults():
    assert provenance.faults([]) == []
    assert provenance.faults([made(more={"polygpt.x": "1"}), made(more={"polygpt.y": "2"}), made(commit=None)]) == []


def test_mixtures_unknown_code_and_uncommitted_changes_are_told_with_their_numbers():
    (mixed,) = provenance.faults([made(), made(core="b" * 32)])
    assert "different versions of the library source" in mixed and "1 of aaaa" in mixed and "1 of bbbb" in mixed
    (module,) = provenance.faults([made(more={"polygpt.x": "1"}), made(more={"polygpt.x": "2"})])
    assert "different versions of polygpt.x" in module
    unknown, dirty = provenance.faults([made(), made(commit="d" * 40 + "-dirty", code=False)])
    assert unknown.startswith("1 of 2 runs have unknown code") and "dddddddddddd" in unknown
    assert dirty.startswith("1 of 2 runs were made with uncommitted changes")
    assert provenance.summary([made(), made(code=False)]) == "code aaaaaaaaaaaa, unknown code (commit cccccccccccc)"


@pytest.fixture
def results(tmp_path):
    """An ablation with made-up results; gives its folder."""
    file = write_ablation(tmp_path / "own", "")
    write_results(file, lambda variant, at, seed: 2.0 + seed / 10)
    return file.parent


def test_the_readme_reports_a_mixture(results):
    assert "**Code.**" not in readme.write(results)[0].read_text()
    *lines, last = read(results / RESULTS)
    (results / RESULTS).unlink()
    last["made"] = last["made"] | {"code": CODE | {"core": "f" * 32}}
    append(results / RESULTS, [*lines, last])
    text = readme.write(results)[0].read_text()
    assert "**Code.** Runs used different versions" in text and "11 of abcdef012345" in text and "1 of ffff" in text
    older = [{name: value for name, value in line.items() if name != "schema"} for line in lines]
    for line in older:
        line["made"] = {name: value for name, value in line["made"].items() if name != "code"}
    (results / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in older))
    assert "11 of 11 runs have unknown code" in readme.write(results)[0].read_text()


def test_strict_code_refuses_to_add_runs_of_other_code_before_anything_is_run(results):
    ablation = load_ablation(results / "experiment.py")
    assert len(run_all(ablation, results, strict_code=True).records) == 12, "all are of one code"
    before = (results / RESULTS).read_text()
    with pytest.raises(UserError, match="different versions of the library source.*Commit"):
        run_all(ablation, results, seeds=5, strict_code=True)
    assert (results / RESULTS).read_text() == before


def test_strict_code_refuses_uncommitted_changes(results, monkeypatch):
    (results / RESULTS).unlink()
    monkeypatch.setattr(provenance, "commit", lambda: "e" * 40 + "-dirty")
    with pytest.raises(UserError, match="3 of 3 runs were made with uncommitted changes"):
        run_all(load_ablation(results / "experiment.py"), results, seeds=1, strict_code=True)
    assert not Path(results / RESULTS).exists()
