"""`polygpt attention list`, `new` and `bench`."""

import inspect
import json
import re

import jax
import jax.numpy as jnp
import pytest

from polygpt.attention.multi_head import MultiHead
from polygpt.attention.recurrent import Recurrent
from polygpt.cli.main import main
from polygpt.lab import catalogue, starter
from polygpt.overrides import override
from polygpt.spec import load_class

ENTRIES = [catalogue.entry(cls) for cls in catalogue.variants()]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_variant_says_what_it_is(entry):
    assert load_class(entry.spec).__name__ == entry.name
    assert entry.family in ("softmax", "linear")
    assert re.fullmatch(r"\d{4}\.\d{4,5}|[A-Z][\w .]+, (19|20)\d\d, \S+", entry.paper), "arXiv, or author, year, place"
    assert 10 < len(entry.about) and entry.cost and not entry.about.endswith(" al")
    source = inspect.getdoc(load_class(entry.spec)) + inspect.getmodule(load_class(entry.spec)).__doc__
    assert re.split("[,/]", entry.paper)[0] in source, "the docstring says more of it"
    assert set(entry.backends) <= {"reference", "chunked", "library", "flex"}
    assert bool(entry.backends) == (entry.family == "softmax"), "the linear family has forms of its own"


def test_a_source_is_not_inherited():
    class Nearer(MultiHead):
        """Of my own. Not by Vaswani et al. (1706.03762)."""

    mine, known = catalogue.entry(Nearer), {one.name: one for one in ENTRIES}
    assert (mine.paper, mine.about) == ("", "Of my own")
    assert known["SoftmaxOffByOne"].paper == "Miller, 2023, evanmiller.org/attention-is-off-by-one.html"
    assert known["LinearAttention"].about == "Softmax replaced by phi(q) phi(k)^T, phi = elu + 1"
    rows = catalogue.markdown([mine, known["MultiHead"], known["SoftmaxOffByOne"]]).splitlines()[2:]
    cells = [row.split(" | ")[2] for row in rows]
    assert cells == ["–", "[1706.03762](https://arxiv.org/abs/1706.03762)", known["SoftmaxOffByOne"].paper]


def test_the_list_names_every_variant_once(capsys):
    assert main(["attention", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    specs = [one["spec"] for one in found["variants"]]
    assert len(set(specs)) == len(specs) == len(ENTRIES) >= 20
    assert set(found["backends"]) == {"auto", "reference", "chunked", "library", "flex"}
    assert "GPU" in found["backends"]["flex"] and "TPU" in found["backends"]["flex"]
    assert main(["attention", "list"]) == 0
    table = capsys.readouterr().out
    assert all(spec.removeprefix("polygpt.attention.") in table for spec in specs)


@pytest.mark.parametrize("kind", starter.KINDS)
def test_a_starting_file_is_a_variant(tmp_path, capsys, kind):
    words = ["attention", "new", "MyOwnHEADS", "--kind", kind, "--folder", str(tmp_path)]
    assert main(words) == 0
    path = tmp_path / "my_own_heads.py"
    assert "experiments/" not in path.read_text(), "an installed package has no such folder"
    assert f"polygpt attention check {path}:MyOwnHEADS" in capsys.readouterr().out
    cls = load_class(f"{path}:MyOwnHEADS")
    assert (
        issubclass(cls, Recurrent if kind == "recurrent" else MultiHead) and override(cls(), {"heads": "2"}).heads == 2
    )
    assert main(words) == 2 and "already exists" in capsys.readouterr().err, "nothing is overwritten"
    few = "causality, full cache = no cache, gradient = finite differences"
    assert main(["attention", "check", f"{path}:MyOwnHEADS", "--only", few, "--json"]) == 0
    assert [one["passed"] for one in json.loads(capsys.readouterr().out)["findings"]] == [True] * 3


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NearFirst", "near_first"),
        ("H2O", "h2o"),
        ("V2Gate", "v2_gate"),
        ("A_b", "a_b"),
        ("GQAWide", "gqa_wide"),
        ("Near_First", "near_first"),
    ],
)
def test_a_starting_file_is_called_as_its_class(tmp_path, name, file):
    assert starter.write(name, "mask", tmp_path) == (tmp_path / f"{file}.py", name)


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("lower", "mask", "class name"),
        ("None", "mask", "class name"),
        ("Two words", "mask", "class name"),
        ("A²", "mask", "class name"),
        ("Decay", "mask", "already uses the name Decay"),
        ("Recurrent", "recurrent", "already uses the name Recurrent"),
    ],
)
def test_a_name_that_makes_no_class_is_told(tmp_path, capsys, name, kind, part):
    assert main(["attention", "new", name, "--kind", kind, "--folder", str(tmp_path)]) == 2
    assert part in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["attention", "new", "Near", "--folder", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert "near.py cannot be written" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_benchmark_compares_two_variants(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.ones(shape))  # compiles sooner, costs the same
    window = "polygpt.attention.sliding:SlidingWindow"
    words = ["attention", "bench", window, "--window", "4", "--against", "polygpt.attention.multi_head:MultiHead"]
    assert main([*words, "--lengths", "8,16", "--model_width", "16", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert len(costs) == 2 * 2 * 3 and all(cost["seconds"] > 0 and cost["megabytes"] > 0 for cost in costs)
    flops = {(cost["variant"], cost["length"], cost["kind"]): 1e9 * cost["gflops"] for cost in costs}
    projections = 2 * 4 * 16 * 16
    assert flops["MultiHead", 8, "forward"] == pytest.approx(8 * (projections + 4 * 16 * 4.5))
    seen = 1 + 2 + 3 + 13 * 4  # by all 16 positions
    assert flops["SlidingWindow", 16, "forward and backward"] == pytest.approx(3 * (16 * projections + 4 * 16 * seen))
    assert flops["MultiHead", 16, "decode"] == pytest.approx(projections + 4 * 16 * 16)
    (picture,) = (tmp_path / "runs").iterdir()
    assert picture.stat().st_size > 5000 and picture.name.startswith("SlidingWindow-MultiHead-window-4")
    assert main([*words, "--lengths", "8,x"]) == 2 and re.search("--lengths", capsys.readouterr().err)
