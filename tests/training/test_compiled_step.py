"""What the compiled training step holds, and what it must not."""

from pathlib import Path

import jax
import pytest

from polygpt.runtime import compilation
from polygpt.spec import load_file

BENCHMARK = Path(__file__).parents[2] / "experiments" / "benchmarks" / "text_step.py"


def test_the_step_copies_no_array_as_large_as_the_attention_weights():
    benchmark = load_file(BENCHMARK)
    run = benchmark.polygpt_step(benchmark.Size(depth=1, width=32, heads=2, length=64, rows=2), 65)
    program = run.compiled.as_text()
    assert run() > run() > 0, "it trains"
    weights = 2 * 2 * 64 * 64
    assert "exponential" in program and not benchmark.large_copies(program, weights)


def test_large_copies_are_found():
    benchmark = load_file(BENCHMARK)
    program = jax.jit(lambda x: x.T.copy() @ x.T).lower(jax.ShapeDtypeStruct((64, 64), "float32")).as_text("hlo")
    assert benchmark.large_copies(program, 64 * 64) and not benchmark.large_copies(program, 64 * 64 + 1)


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("the option is for CPUs")
    compilation.compiler_options.cache_clear()
    real = jax.jit

    def jit(function, **options):
        if "compiler_options" in options:
            options["compiler_options"] = {"xla_no_such_option": "1"}
        return real(function, **options)

    monkeypatch.setattr(jax, "jit", jit)
    assert compilation.compiler_options() is None
    monkeypatch.undo()
    compilation.compiler_options.cache_clear()
