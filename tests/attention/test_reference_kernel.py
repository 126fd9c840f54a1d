"""Materialised attention against float64 NumPy: values pair by pair, gradients by differences of those values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import NAMES, WITH_PAIRS, answers, assert_agrees, cotangents, expected, floats, problem, with_floats

from polygpt.attention.kernels import chunked, reference
from polygpt.attention.kernels.reference import attend, attention_weights

compiled = jax.jit(attend, static_argnums=0)


@pytest.mark.parametrize("name", [*NAMES, *WITH_PAIRS])
def test_it_equals_float64(name):
    assert_agrees(attend, *problem(name))  # of the program whose gradients are tested below


def test_it_equals_float64_where_softmax_is_saturated():
    rule, operands = problem("packed")
    operands = dataclasses.replace(operands, query_BHTd=operands.query_BHTd * 100)
    # Scores are 100 times as large, and so is their rounding.
    assert_agrees(attend, rule, operands, gradients=False, tolerance=100)


@pytest.mark.parametrize("name", [*NAMES, "pairs"])
def test_its_gradients_are_the_slopes_of_float64(name):
    """Along a random direction, that of each array by itself."""
    rule, operands = problem(name)
    y_cotangent, lse_cotangent = cotangents(operands)
    _, gradients = answers(attend, rule, operands, y_cotangent, lse_cotangent)
    arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), floats(operands))
    leaves, structure = jax.tree.flatten(arrays)
    rng, step = np.random.default_rng(2), 1e-4

    def total(leaves):
        y, lse = expected(rule, with_floats(operands, jax.tree.unflatten(structure, leaves)))
        return np.sum(y * y_cotangent) + np.sum(np.where(np.isfinite(lse), lse, 0) * lse_cotangent)

    for i, got in enumerate(jax.tree.leaves(gradients)):
        direction = rng.choice([-1.0, 1.0], leaves[i].shape)
        ahead, behind = ([*leaves[:i], leaves[i] + sign * step * direction, *leaves[i + 1 :]] for sign in (1, -1))
        slope = (total(ahead) - total(behind)) / (2 * step)
        terms = np.asarray(got, np.float64) * direction
        # Some roundings of each term, and the differences' own error: step^2 = 1e-8 times some derivative.
        rounding = 16 * np.finfo(np.float32).eps * max(1.0, np.abs(terms).sum())
        np.testing.assert_allclose(terms.sum(), slope, rtol=0, atol=rounding)


@pytest.mark.parametrize("backend", [reference, chunked], ids=["reference", "chunked"])
@pytest.mark.parametrize(
    "name",
    ["empty", "gates", "sigmoid_terms", *(pytest.param(name, marks=pytest.mark.slow) for name in ("packed", "slopes"))],
)
def test_gradients_of_parts_of_the_keys_add_up_to_those_of_all(name, backend):
    rule, operands = problem(name)
    dy, dlse = cotangents(operands)
    (y, lse), want = answers(attend, rule, operands, dy, dlse)
    dlse = np.where(lse > reference.LOWEST / 2, dlse, 0)
    delta = np.sum(dy * np.asarray(y), axis=-1) - dlse
    parts = []
    for chosen in (slice(None, 5), slice(5, None)):
        part = dataclasses.replace(
            operands,
            key_BKSd=operands.key_BKSd[:, :, chosen],
            value_BKSe=operands.value_BKSe[:, :, chosen],
            key=jax.tree.map(lambda x: x[:, chosen], operands.key),  # noqa: B023
            terms=dataclasses.replace(operands.terms, key={n: x[:, :, chosen] for n, x in operands.terms.key.items()}),
        )
        parts.append(jax.jit(backend.gradients, static_argnums=0)(rule, part, lse, dy, delta))
    first, second = map(floats, parts)

    def agree(path, want, first, second):
        of_keys = {entry.key for entry in path} & {"key", "value"}
        got = np.concatenate([first, second], axis=2) if of_keys else np.add(first, second)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()), err_msg=str(path))

    jax.tree_util.tree_map_with_path(agree, want, first, second)


@pytest.mark.parametrize("name", ["empty", "sigmoid"])
def test_a_query_without_keys_gets_zeros_and_zero_gradients(name):
    rule, operands = problem(name)
    (y, lse), gradients = answers(attend, rule, operands, *cotangents(operands))
    assert (y[1] == 0).all() and (y[0, :, :13] != 0).any(-1).all() and np.isfinite(lse).all()
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_a_key_that_is_not_allowed_has_no_weight_however_large_its_score():
    rule, operands = problem("packed")
    hidden = np.asarray(operands.key.segment == 0)[:, None, :, None]
    huge = dataclasses.replace(operands, key_BKSd=np.where(hidden, np.float32(1e30), operands.key_BKSd))
    np.testing.assert_array_equal(compiled(rule, huge)[0], compiled(rule, operands)[0])
    assert hidden.any()


def test_the_values_decide_the_dtype_and_the_softmax_stays_in_float32():
    rule, operands = problem("empty", dtype="bfloat16")
    assert_agrees(attend, rule, operands)
    weights = attention_weights(rule, operands)
    assert weights.dtype == jnp.float32
    total = np.asarray(weights.sum(-1))
    np.testing.assert_allclose(total[0, :, :13], 1, rtol=0, atol=1e-6)
    assert (total[1] == 0).all()


def test_chosen_queries_are_the_rows_of_the_whole():
    rule, operands = problem("gates")
    chosen = np.array([3, 0, 12])
    some, all_of_them = (compiled(rule, one)[0] for one in (operands.of_queries(chosen), operands))
    np.testing.assert_allclose(some, all_of_them[:, :, chosen], rtol=0, atol=2e-6)
