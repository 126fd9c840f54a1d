"""`make bench`: its pages show what results.json has, every benchmark is listed and runs at toy size."""

import json
import subprocess
import sys

import harness
import jax
import pytest
import rendering

FILES = {path.stem: path for path in rendering.FOLDER.glob("*.py")}
BENCHMARKS = sorted(name for name, path in FILES.items() if "\ndef run(quick" in path.read_text())
SLOW = {"attention_layer", "compile_depth", "gpu", "multimodal_step", "startup"}
"""Those that take more than a few seconds at toy size."""


def test_the_pages_show_the_stored_results():
    for page, text in rendering.rendered(rendering.load()).items():
        assert page.read_text(encoding="utf-8") == text, "run python experiments/benchmarks --render"


def test_every_benchmark_is_listed_and_every_figure_exists():
    assert {*rendering.PARTS, rendering.GPU} >= set(BENCHMARKS) >= set(rendering.PARTS)
    table = (rendering.FOLDER / "README.md").read_text()
    assert [name for name in FILES if f"[{name}.py]({name}.py)" not in table] == []
    records = rendering.load()
    for page in rendering.PAGES:
        for name, key in rendering.FIGURE.findall(page.read_text(encoding="utf-8")):
            assert name not in records or key in rendering.benchmark(name).figures(records[name]["result"])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BENCHMARKS])
def test_a_benchmark_runs_at_toy_size(name):
    module = rendering.benchmark(name)
    try:
        result = module.run(True, lambda text: None)
    except harness.Unmeasurable as reason:
        pytest.skip(str(reason))
    assert "|" in module.tables(json.loads(json.dumps(result, allow_nan=False)))
    assert module.TITLE and module.__doc__


def test_sides_alternate_and_short_ones_are_called_more_often():
    calls = []

    def side(name, seconds):
        return lambda: calls.append(name) or seconds

    found = harness.alternate({"a": side("a", 1.0), "b": side("b", 2.0)}, 3, warmup=1, own_clock=True)
    assert "".join(calls) == "abbaabba"
    assert found["b"] == {"median": 2.0, "low": 2.0, "high": 2.0, "values": [2.0] * 3}
    assert harness.ratio(found["b"], found["a"])["median"] == 2
    calls.clear()
    harness.alternate({"a": side("a", 0.25)}, 1, warmup=1, own_clock=True, least=1.0)
    assert len(calls) == 1 + 1 + 5, "the warm-up, one without a clock, and five that take at least a second"


def test_quartiles_are_numpys():
    import numpy as np

    values = [3.0, 1.0, 7.0, 2.0, 9.0, 4.0, 8.0, 5.0]
    found = harness.summary(values)
    assert [found[key] for key in ("low", "median", "high")] == list(np.quantile(values, (0.25, 0.5, 0.75)))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.012345, "0.0123"), (1.0, "1.00"), (99.96, "100"), (12345.6, "12,300")]
)
def test_numbers_have_three_digits(value, text):
    assert harness.number(value) == text


def test_without_a_gpu_it_stops_with_one_line():
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(harness.Unmeasurable, match=r"^no GPU: jax computes on \w+ here; .*$"):
        rendering.benchmark("gpu").run(False, lambda text: None)


def test_a_missing_package_and_an_unknown_benchmark_are_one_line():
    with pytest.raises(harness.Unmeasurable, match="no_such_package is not installed: pip install no_such_package"):
        harness.need("no_such_package")
    words = [sys.executable, str(rendering.FOLDER), "no_such_benchmark"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "no benchmark no_such_benchmark: name some of" in done.stderr
