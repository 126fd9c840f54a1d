"""Attention block by block: against float64 and the reference, in tiny blocks; its memory; what it skips."""

import dataclasses
import functools
import statistics
import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import NAMES, WITH_PAIRS, Near, assert_agrees, floats, problem, with_floats

from polygpt.attention.kernels import chunked, reference
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER, Causal
from polygpt.attention.meta import Meta


def in_tiny_blocks(rule, operands):
    return chunked.in_blocks(rule, operands, 5, 4)


QUICK = ("spans", "labels", "decode", "far_or_first", "table", "gates", "sigmoid_terms")
"""Between them every kind of tile and term, both normalizers, GQA and MQA, spans, padding, other numbers of keys."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES] + [*WITH_PAIRS]
)
def test_it_equals_float64_and_the_gradients_of_the_reference(name):
    assert_agrees(in_tiny_blocks, *problem(name))


@pytest.mark.parametrize("name", [pytest.param("packed", marks=pytest.mark.slow), "gates"])
def test_in_bfloat16_it_sums_in_float32(name):
    assert_agrees(in_tiny_blocks, *problem(name, dtype="bfloat16"))


def test_the_block_sizes_of_its_own_choice():
    assert chunked.refuses(*problem("packed")) is None
    assert_agrees(chunked.attend, *problem("packed", seed=3))


def test_places_beyond_the_end_weigh_nothing_where_the_mask_does_not_ask_for_segments():
    rule, operands = problem("plain")
    assert_agrees(in_tiny_blocks, dataclasses.replace(rule, mask=Causal() | ~Causal()), operands)


def gradients(rule, operands):
    def total(arrays):
        y, lse = in_tiny_blocks(rule, with_floats(operands, arrays))
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.where(lse > -1e30, jnp.cos(lse), 0))

    return jax.grad(total)(floats(operands))


FRAMES = {
    "remat": lambda f, operands: jax.jit(jax.checkpoint(f))(operands),
    "scan": lambda f, operands: jax.tree.map(
        lambda x: x[1], jax.jit(lambda o: jax.lax.scan(lambda c, _: (c, f(o)), 0, length=2)[1])(operands)
    ),
    "vmap": lambda f, operands: jax.tree.map(
        lambda x: x[1],
        jax.jit(jax.vmap(f))(jax.tree.map(lambda x: jnp.stack([jnp.roll(x, 1, axis=0), x]), operands)),
    ),
    "pmap": lambda f, operands: jax.tree.map(lambda x: x[0], jax.pmap(f)(jax.tree.map(lambda x: x[None], operands))),
    "no jit": lambda f, operands: f(operands),
}


@pytest.mark.parametrize(
    "frame", ["remat", "vmap", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scan", "pmap", "no jit"))]
)
def test_it_works_inside(frame):
    rule, operands = problem("gates")
    f = functools.partial(gradients, rule)
    got, want = FRAMES[frame](f, operands), jax.jit(f)(operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


def long_problem(T: int, mask=DECODER, d: int = 8) -> tuple[Rule, Operands]:
    """One row, one head."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(np.float32(rng.normal(size=(1, 1, T, d)) * scale)) for scale in (d**-0.5, 1, 1)]
    place = jnp.arange(T, dtype=jnp.int32)[None]
    meta = Meta(place, place, jnp.ones_like(place), jnp.zeros_like(place), jnp.zeros_like(place))
    return Rule(mask), Operands(*arrays, meta, meta)


def compiled(attend, rule, operands, backward: bool, **options):
    """The compiled program of the values, or of the gradients, with the compiler's options."""

    def total(arrays, operands):
        return jnp.sum(jnp.sin(attend(rule, with_floats(operands, arrays))[0]))

    def values(operands):
        return attend(rule, operands)[0]

    def slopes(operands):
        return jax.grad(total)(floats(operands), operands)

    return jax.jit(slopes if backward else values).lower(operands).compile(options)


@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True], ids=["forward", "backward"])
def test_memory_is_linear_in_the_length(backward):
    def memory(attend, T):
        return compiled(attend, *long_problem(T), backward).memory_analysis().temp_size_in_bytes

    def small_blocks(rule, operands):
        return chunked.in_blocks(rule, operands, 64, 64)

    sizes = [memory(small_blocks, T) for T in (1024, 2048, 4096)]
    # Twice the length: twice the arrays, and tiles as large as before. The block map is T^2 / 64^2 bytes.
    assert sizes[1] < 2.1 * sizes[0] and sizes[2] < 2.1 * sizes[1], sizes
    dense = [memory(reference.attend, T) for T in (1024, 2048)]
    assert dense[1] > 3.8 * dense[0] and dense[1] > 10 * sizes[1], (dense, sizes)


def test_a_row_of_tiles_visits_what_the_window_reaches():
    """The longest text costs no more tiles a query than a short one: NaN in the other values does not come out."""
    rule, operands = long_problem(256, DECODER & Near(16))
    far = jnp.arange(256)[None, None, :, None] < 128
    poisoned = dataclasses.replace(operands, value_BKSe=jnp.where(far, jnp.nan, operands.value_BKSe))
    y, _ = chunked.in_blocks(rule, poisoned, 16, 16)
    want, _ = chunked.in_blocks(rule, operands, 16, 16)
    # 0 x NaN is NaN: of a block that is visited, hidden values do come out.
    np.testing.assert_array_equal(y[:, :, 144:], want[:, :, 144:])
    assert np.isnan(y[:, :, 128:143]).all()


@pytest.mark.slow
def test_a_window_is_five_times_as_fast_as_the_dense_reference(capsys):
    """In processor time, which other tests hardly change; compiled as users do, not as quickly as tests do."""
    users = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    if not metadata.version("jaxlib").startswith("0.10."):
        del users["xla_cpu_use_fusion_emitters"]  # later ones have it no more
    rule, operands = long_problem(16384, DECODER & Near(1024), d=64)
    for backward in (False, True):
        sides = {
            "reference": compiled(reference.attend, rule, operands, backward, **users),
            "chunked": compiled(chunked.attend, rule, operands, backward, **users),
        }
        seconds = {name: [] for name in sides}
        for _ in range(3):
            for name, run in sides.items():
                start = time.process_time()
                jax.block_until_ready(run(operands))
                seconds[name].append(time.process_time() - start)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = median["reference"] / median["chunked"]
        with capsys.disabled():
            print(f"\n{'forward and backward' if backward else 'forward'}: {median}, ratio {ratio:.1f}")
        assert ratio > 5
