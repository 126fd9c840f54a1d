"""Sampling against independent float64 NumPy references, ties and edge values included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polygpt.errors import SpecError
from polygpt.generation.sampling import (
    GREEDY,
    Sampling,
    adjust,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)


def probabilities(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


# References: one row, in words of the definitions, token by token.


def reference_top_k(row, k):
    return {v for v in range(len(row)) if sum(other > row[v] for other in row) < k}


def reference_top_p(row, p):
    probability, kept = probabilities(row), set()
    for value in sorted(set(row), reverse=True):  # groups of ties, likeliest first
        if sum(probability[v] for v in kept) >= p:
            break
        kept |= {v for v in range(len(row)) if row[v] == value}
    return kept


def reference_min_p(row, p):
    probability = probabilities(row)
    return {v for v in range(len(row)) if probability[v] >= p * probability.max()}


def only(tokens, row):
    return np.where([v in tokens for v in range(len(row))], row, -np.inf)


def kept(logits):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits)]


ROWS = np.random.default_rng(0).normal(0, 3, (40, 17)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 5, 16, 17, 50])
def test_top_k_keeps_what_the_reference_keeps(k):
    assert kept(keep_top_k(ROWS, k)) == [reference_top_k(row, k) for row in ROWS]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_the_reference_keeps(p):
    assert kept(keep_top_p(ROWS, p)) == [reference_top_p(row, p) for row in ROWS]


@pytest.mark.parametrize("p", [1e-3, 0.05, 0.3, 0.99])
def test_min_p_keeps_what_the_reference_keeps(p):
    assert kept(keep_min_p(ROWS, p)) == [reference_min_p(row, p) for row in ROWS]


def test_ties_with_the_last_kept_token_are_kept():
    row = np.log(np.float32([[0.5, 0.125, 0.125, 0.125, 0.125]]))
    assert kept(keep_top_k(row, 1)) == [{0}]
    assert kept(keep_top_k(row, 2)) == [{0, 1, 2, 3, 4}]
    assert kept(keep_top_p(row, 0.55)) == [{0, 1, 2, 3, 4}]
    assert kept(keep_min_p(row, 0.2)) == [{0, 1, 2, 3, 4}]
    level = np.zeros((1, 6), np.float32)
    for filtered in (keep_top_k(level, 1), keep_top_p(level, 0.01), keep_min_p(level, 1.0)):
        assert kept(filtered) == [set(range(6))]


def test_the_nucleus_sums_to_at_least_p_and_no_token_more():
    row = np.log(np.float32([[0.5, 0.25, 0.125, 0.125]]))
    sizes = {p: len(kept(keep_top_p(row, p))[0]) for p in (0.49, 0.51, 0.74, 0.76)}
    assert sizes == {0.49: 1, 0.51: 2, 0.74: 2, 0.76: 4}


def test_the_likeliest_token_survives_every_filter():
    row = np.float32([[-np.inf, 3.0, -np.inf, 1.0]])
    for filtered in (keep_top_k(row, 1), keep_top_p(row, 1e-9), keep_min_p(row, 1.0)):
        assert kept(filtered) == [{1}]


def test_filters_never_bring_back_a_dropped_token():
    row = np.float32([[0.0, -np.inf, 0.0, -np.inf]])
    for filtered in (keep_top_k(row, 4), keep_top_p(row, 0.999), keep_min_p(row, 1e-6)):
        assert kept(filtered) == [{0, 2}]


def test_kept_logits_are_unchanged():
    filtered = np.asarray(keep_top_p(keep_top_k(ROWS, 9), 0.8))
    assert np.array_equal(filtered[np.isfinite(filtered)], ROWS[np.isfinite(filtered)])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits, seen = np.float32([[2.0, -2.0, 2.0, -2.0, 0.0]]), np.array([[True, True, False, False, True]])
    assert np.allclose(penalize_repetition(logits, seen, 1.5), [[2 / 1.5, -3.0, 2.0, -2.0, 0.0]], rtol=1e-6)
    assert np.array_equal(penalize_repetition(logits, seen, 1.0), logits)


@settings(max_examples=30, deadline=None)
@given(
    temperature=st.floats(0.1, 3),
    k=st.integers(0, 12),
    p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 2),
    seed=st.integers(0, 1000),
)
def test_all_together_equal_the_reference_in_order(temperature, k, p, min_p, penalty, seed):
    rng = np.random.default_rng(seed)
    logits, seen = rng.normal(0, 2, (1, 10)).astype(np.float32), rng.random((1, 10)) < 0.3
    sampling = Sampling(temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty)
    got = np.asarray(adjust(jnp.asarray(logits), seen, sampling))[0]

    row = logits[0].astype(np.float64)
    row = np.where(seen[0], np.where(row > 0, row / penalty, row * penalty), row) / temperature
    row = row - row.max()  # the same for all tokens of a row: no probability changes
    if k:
        row = only(reference_top_k(row, k), row)
    if p < 1:
        assume(reference_top_p(row, p - 1e-5) == reference_top_p(row, p + 1e-5))  # nearer, rounding decides
        row = only(reference_top_p(row, p), row)
    if min_p > 0:
        assume(reference_min_p(row, min_p * (1 - 1e-5)) == reference_min_p(row, min_p * (1 + 1e-5)))
        row = only(reference_min_p(row, min_p), row)
    assert kept(got[None]) == [set(np.flatnonzero(np.isfinite(row)))]
    assert np.allclose(got[np.isfinite(got)], row[np.isfinite(got)], rtol=1e-5, atol=1e-5)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.float32([[0, 2, 2], [1, 0, -1]])
    assert choose(logits, None, None, GREEDY).tolist() == [1, 0]


def test_greedy_minds_the_repetition_penalty():
    sampling = GREEDY.replace(repetition_penalty=4.0)
    assert choose(jnp.float32([[3.0, 1.0]]), np.array([[True, False]]), None, sampling).tolist() == [1]


def test_samples_follow_the_filtered_distribution():
    n = 20_000
    logits = jnp.tile(jnp.log(jnp.float32([0.4, 0.3, 0.2, 0.1])), (n, 1))
    keys = jax.random.split(jax.random.key(0), n)
    drawn = np.bincount(choose(logits, None, keys, Sampling(temperature=0.5, top_k=3)), minlength=4) / n
    expected = np.array([0.16, 0.09, 0.04, 0]) / 0.29
    assert drawn[3] == 0
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(0.25 / n)


def test_a_row_is_sampled_by_its_own_key():
    logits, keys = jnp.asarray(ROWS), jax.random.split(jax.random.key(1), len(ROWS))
    together = choose(logits, None, keys, Sampling())
    alone = [int(choose(logits[i : i + 1], None, keys[i : i + 1], Sampling())[0]) for i in range(len(ROWS))]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(field, value):
    with pytest.raises(SpecError, match=rf"Sampling\.{field} is"):
        Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-40, 5e-324])
def test_any_positive_temperature_however_small_takes_the_likeliest(temperature):
    logits = np.asarray([[3.0, 40.0, 39.0], [-5.0, -7.0, -5.5]], np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    chosen = jax.jit(lambda x: choose(x, jnp.zeros(x.shape, bool), keys, Sampling(temperature=temperature)))(logits)
    assert chosen.tolist() == [1, 0]
