"""Copies of user code: what is kept, and that a run goes on with its own copies however the originals change."""

import dataclasses
import json
import pickle
import subprocess
import sys
import types

import pytest

from polygpt import snapshot, spec
from polygpt.data.pickling import dumps
from polygpt.errors import SpecError, UserError
from polygpt.snapshot import Snapshot, keep
from polygpt.sources import code_hash, collect

FILE = '''"""A user's file."""
import dataclasses
import json  # of the standard library
from polygpt.spec import Spec
import {helper}
from {package} import part
import {package}.deep.inner

@dataclasses.dataclass(frozen=True)
class Mine(Spec):
    size: int = 3

    def total(self):
        from {package}.lazy import late
        return [self.size, {helper}.FACTOR, part.value(), {package}.deep.inner.NAME, late()]

def experiment():
    return Mine()
'''
FILES = {
    "helper.py": "FACTOR = 2\n",
    "package/__init__.py": "",
    "package/part.py": "from . import lazy\nfrom .deep.inner import NAME\nvalue = lambda: NAME + lazy.late()\n",
    "package/lazy.py": "def late():\n    return 'late'\n",
    "package/deep/__init__.py": "",
    "package/deep/inner.py": "NAME = 'inner'\n",
    "package/unused.py": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """A folder of user files on the path; the names of their modules are the test's own."""
    folder = tmp_path / "mine"
    number = abs(hash(request.node.name))
    names = {"helper": f"helper{number}", "package": f"package{number}"}
    for place, text in FILES.items():
        for name, own in names.items():
            place = place.replace(name, own)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)
    (folder / "near.py").write_text(FILE.format(**names))
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield types.SimpleNamespace(path=folder, near=folder / "near.py", **names)
    for name in set(sys.modules) - before:
        del sys.modules[name]


def forget(folder):
    """As in another process: nothing of the folder is loaded."""
    for name, module in list(sys.modules.items()):
        if str(folder.path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def opened(data, code):
    """A specification as a run reads it."""
    return spec.from_json(data, load=Snapshot(code).load_module)


def test_a_file_is_kept_with_what_it_imports_from_its_folder(folder, tmp_path):
    mine = spec.load_file(folder.near).Mine(5)
    keep(mine, tmp_path / "code")
    package, helper = folder.package, folder.helper
    files = {path.relative_to(tmp_path / "code/mine").as_posix() for path in (tmp_path / "code").rglob("*.py")}
    inner = [f"{package}/{name}.py" for name in ("__init__", "part", "lazy", "deep/__init__", "deep/inner")]
    assert files == {"near.py", f"{helper}.py", *inner}
    index = json.loads((tmp_path / "code/sources.json").read_text())["modules"]
    assert {entry["name"] for entry in index} >= {str(folder.near), helper, f"{package}.deep.inner"}
    keep(spec.Spec(), tmp_path / "code")
    assert not (tmp_path / "code").exists()


def test_unchanged_files_are_used_themselves(folder, tmp_path):
    mine = spec.load_file(folder.near).Mine(5)
    keep(mine, tmp_path / "code")
    assert type(opened(spec.to_json(mine), tmp_path / "code")) is type(mine)
    folder.near.write_text("# a comment\n" + folder.near.read_text().replace("return Mine()", "return Mine(7)"))
    forget(folder)
    assert Snapshot(tmp_path / "code").edited() == []


@pytest.mark.parametrize("edited", ["near", "helper", "lazy", "gone", "broken"])
def test_a_copy_is_used_when_an_original_has_changed_or_is_gone(folder, tmp_path, edited):
    mine = spec.load_file(folder.near).Mine(5)
    total, data = mine.total(), spec.to_json(mine)
    keep(mine, tmp_path / "code")
    forget(folder)
    if edited == "gone":
        folder.path.rename(tmp_path / "elsewhere")
    elif edited == "helper":
        (folder.path / f"{folder.helper}.py").write_text("FACTOR = 1000\n")
    elif edited == "lazy":
        (folder.path / folder.package / "lazy.py").write_text("def late():\n    return 'changed'\n")
    else:
        changed = {"near": ("self.size,", "self.size + 1000,"), "broken": ("class Mine", "class Mine(")}[edited]
        folder.near.write_text(folder.near.read_text().replace(*changed))
    kept = Snapshot(tmp_path / "code")
    again = opened(data, tmp_path / "code")
    assert again.total() == total == [5, 2, "innerlate", "inner", "late"]
    assert spec.to_json(again) == data, "the names are those of the originals"
    assert len(kept.edited()) == (edited != "gone")
    if edited in ("near", "broken"):
        assert kept.edited() == [str(folder.near)]
    if edited == "gone":
        with pytest.raises(SpecError, match="omit --code current"):
            spec.from_json(data, load=kept.load_current)
    if edited == "near":
        assert spec.from_json(data, load=kept.load_current).total()[0] == 1005


def test_two_runs_with_different_copies_are_open_together(folder, tmp_path):
    data = spec.to_json(spec.load_file(folder.near).Mine(1))
    for name, factor in (("one", 2), ("two", 3), ("three", 4)):
        (folder.path / f"{folder.helper}.py").write_text(f"FACTOR = {factor}\n")
        forget(folder)
        keep(spec.load_file(folder.near).Mine(1), tmp_path / name)
    forget(folder)
    one, two = opened(data, tmp_path / "one"), opened(data, tmp_path / "two")
    assert (one.total()[1], two.total()[1]) == (2, 3) and one != two
    keep(one, tmp_path / "another")  # a run of an experiment that was opened keeps the code it was opened with
    assert opened(data, tmp_path / "another").total()[1] == 2


def test_what_is_kept_is_what_was_loaded_though_the_file_was_edited_since(folder, tmp_path):
    mine = spec.load_file(folder.near).Mine(5)
    before = folder.near.read_bytes()
    folder.near.write_text(folder.near.read_text().replace("size: int = 3", "size: int = 4"))
    assert collect(mine)[str(folder.near)].text == before


def test_a_copy_travels_to_another_process(folder, tmp_path):
    data = spec.to_json(spec.load_file(folder.near).Mine(5))
    keep(spec.load_file(folder.near).Mine(5), tmp_path / "code")
    forget(folder)
    folder.path.rename(tmp_path / "elsewhere")
    again = opened(data, tmp_path / "code")
    assert pickle.loads(dumps(again)) == again
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).total())"
    done = subprocess.run([sys.executable, "-c", code], input=dumps(again), capture_output=True)
    assert done.stdout.decode().strip() == str(again.total()), done.stderr


def test_a_copy_that_was_edited_or_removed_is_told(folder, tmp_path, caplog):
    keep(spec.load_file(folder.near).Mine(), tmp_path / "code")
    copy = tmp_path / "code/mine/near.py"
    copy.write_text(copy.read_text() + "\n")
    Snapshot(tmp_path / "code")
    assert f"{copy} was edited" in caplog.text
    copy.unlink()
    with pytest.raises(UserError, match="near.py is missing"):
        Snapshot(tmp_path / "code")


def test_an_old_run_without_copies_uses_the_files(folder, tmp_path):
    mine = spec.load_file(folder.near).Mine(5)
    assert opened(spec.to_json(mine), tmp_path / "code") == mine
    assert snapshot.load_file(str(folder.near)) is sys.modules[str(folder.near)]


def test_the_hash_of_code_leaves_out_comments_and_what_describes_runs(tmp_path):
    texts = ["x = 1\ndef experiment():\n    pass\n", '"""Words."""\nx = 1  # one\n', "x = 2\n"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text)
    one, same, other = (code_hash(tmp_path / f"{i}.py") for i in range(3))
    assert one == same != other


# --- notebooks --------------------------------------------------------------------------------------------------------

CELLS = [
    "import dataclasses\nfrom polygpt.spec import Spec",
    "import math as m; RUNS.append('elsewhere')",
    "this cell failed (",
    "def scale(x):\n    return m.sqrt(x) * FACTOR",
    "FACTOR = 1",
    "FACTOR = 2",
    "x = trained = RUNS.append('training')",  # `x` and `size` are names of the class's own scopes too
    "@dataclasses.dataclass(frozen=True)\nclass Mine(Spec):\n    size: int = 4\n"
    "    def total(self, x=9):\n        return self.size + scale(x)",
    "mine = Mine()",
]


@pytest.fixture
def notebook(monkeypatch):
    """`__main__` as a notebook has it, with its cells executed."""
    main = types.ModuleType("__main__")
    main.In, main.RUNS = ["", *CELLS], []
    monkeypatch.setitem(sys.modules, "__main__", main)
    for cell in CELLS:
        try:
            exec(cell, vars(main))
        except SyntaxError:
            continue
    return main


def test_a_class_of_a_notebook_is_kept_by_its_source(notebook, tmp_path, monkeypatch):
    data = spec.to_json(notebook.mine)
    assert data["class"] == "__main__:Mine" and notebook.mine.total() == 10
    keep(notebook.mine, tmp_path / "code")
    assert type(opened(data, tmp_path / "code")) is notebook.Mine
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # another process
    kept = opened(data, tmp_path / "code")
    assert kept.total() == 10 and spec.to_json(kept) == data
    assert notebook.RUNS == ["elsewhere", "training"], "nothing else is repeated"
    with pytest.raises(SpecError, match="the notebook no longer exists"):
        spec.from_json(data, load=Snapshot(tmp_path / "code").load_current)


def test_a_cell_that_was_executed_again_counts_as_an_edit(notebook, tmp_path):
    data = spec.to_json(notebook.mine)
    keep(notebook.mine, tmp_path / "code")
    notebook.In.append("FACTOR = 3")
    exec("FACTOR = 3", vars(notebook))
    kept = Snapshot(tmp_path / "code")
    assert kept.edited() == ["the notebook"]
    assert (opened(data, tmp_path / "code").total(), notebook.mine.total()) == (10, 13)
    assert spec.from_json(data, load=kept.load_current).total() == 13


def test_a_script_without_a_guard_is_not_run_again(tmp_path, monkeypatch):
    code = "\n".join(cell for cell in CELLS if "failed" not in cell)
    lines = [f"import sys; sys.path.append({str(tmp_path)!r})", "RUNS = []", code]
    lines += ["from pathlib import Path", "from polygpt.snapshot import keep"]
    lines += [f"keep(mine, Path({str(tmp_path / 'code')!r}))", "print('trained')"]
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "trained\n", done.stderr
    data = {"class": "__main__:Mine", "size": 4}
    kept = Snapshot(tmp_path / "code")
    assert kept.edited() == []
    assert spec.from_json(data, load=kept.load_module).total() == 10
    script.write_text(script.read_text().replace("FACTOR = 2", "FACTOR = 5"))
    assert Snapshot(tmp_path / "code").edited() == [str(script)]


def test_a_class_without_source_is_told(monkeypatch, caplog):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec("from polygpt.spec import Spec\nclass Typed(Spec):\n    pass", vars(main))
    assert collect(main.Typed()) == {} and "class Typed was typed into an interpreter" in caplog.text


def test_a_class_that_a_package_has_installed_is_kept_alone():
    """Of what it imports, only its own package counts."""
    from polygpt.sources import _is_users, _roots

    roots = _roots("numpy.linalg")
    file = roots[0] / "linalg" / "__init__.py"
    assert roots[0].name == "numpy" and _is_users("numpy.linalg", file, roots)
    assert not _is_users("scipy", roots[0].parent / "scipy" / "__init__.py", roots)
    assert not _is_users("polygpt.spec", roots[0] / "x.py", roots)


def test_bases_and_nested_values_count():
    @dataclasses.dataclass(frozen=True)
    class Outer(spec.Spec):
        inner: spec.Spec = spec.Spec()

    assert [source.original.name for source in collect(Outer(Outer())).values()] == ["test_snapshot.py"]
