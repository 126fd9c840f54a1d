"""What the compiled training step holds, and what it must not."""

import dataclasses
import re
from math import prod
from pathlib import Path

import jax
import pytest

from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.stack import StackSpec
from polygpt.data.loader import train_batches
from polygpt.models.decoder import DecoderSpec
from polygpt.runtime import compilation
from polygpt.spec import load_file
from polygpt.training.program import assemble

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"
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


@pytest.fixture(scope="module")
def deep():
    """Compiled steps of one and of two blocks of 2 rows x 64 positions, width 32, 2 heads."""
    benchmark = load_file(BENCHMARK)
    size = benchmark.Size(depth=1, width=32, heads=2, length=64, rows=2)
    return [benchmark.polygpt_step(dataclasses.replace(size, depth=depth), 65).compiled for depth in (1, 2)]


def test_a_block_moves_few_arrays_and_keeps_few_copies_of_its_activations(deep):
    one, two = (step.as_text() for step in deep)
    moved = re.compile(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(")

    def elements(program):
        return sum(prod(map(int, shape.split(","))) for shape in moved.findall(program))

    heads = 2 * 64 * 32
    assert elements(two) - elements(one) <= 24 * heads
    temporaries = [step.memory_analysis().temp_size_in_bytes for step in deep]
    weights, hidden = 4 * 2 * 2 * 64 * 64, 4 * 2 * 64 * 4 * 32
    assert temporaries[1] - temporaries[0] <= 3.6 * (weights + hidden)


def test_a_step_sends_nothing_to_the_host(deep):
    for step in deep:
        assert not re.search(r"callback|\b(?:infeed|outfeed|send|recv)\(", step.as_text())


def test_mixed_batches_are_one_program():
    """Text, pictures, speech and pairs of both, in batches of different contents: the step compiles once."""
    whole = load_file(QUICKSTART).experiment()
    tower = StackSpec(width=16, depth=1, attention=MultiHead(heads=2))
    adapters = {name: adapter.replace(tower=tower) for name, adapter in whole.model.adapters.items()}
    decoder = DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2))
    small = whole.replace(
        model=whole.model.replace(decoder=decoder, adapters=adapters), data=whole.data.replace(batch_size=2)
    )
    tokenizer, compiled = small.tokenizer.build(), []
    program = assemble(small, tokenizer.vocabulary)
    state = program.first_state()
    batches = train_batches(small.data, tokenizer, small.model.adapters, seed=0)
    state, _ = program.step(state, program.parallel.put(next(batches)))

    def listen(event, *_, **__):
        compiled.extend([event] if "compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(19):
            state, _ = program.step(state, program.parallel.put(next(batches)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert int(state.step) == 20 and compiled == []
