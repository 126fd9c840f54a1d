"""Materialised softmax attention against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.attention.kernels.reference import attend, attention_weights

B, T, S, D = 2, 5, 7, 4


def expected(query, key, value, allowed):
    """One query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    H, K = query.shape[1], key.shape[1]
    out = np.zeros(query.shape)
    weights = np.zeros((B, H, T, S))
    for b, h, t in np.ndindex(B, H, T):
        seen = np.flatnonzero(allowed[b, t])
        if len(seen):
            kv = h // (H // K)
            score = key[b, kv, seen] @ query[b, h, t] / np.sqrt(D)
            weights[b, h, t, seen] = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
            out[b, h, t] = weights[b, h, t] @ value[b, kv]
    return out, weights


def arrays(H, K, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    query, key, value = (np.float32(rng.normal(size=(B, h, n, D)) * scale) for h, n in ((H, T), (K, S), (K, S)))
    allowed = rng.random((B, T, S)) < 0.6
    allowed[0, 2] = allowed[1, :] = False  # a query that sees nothing, and a row of them
    return query, key, value, allowed


@pytest.mark.parametrize("K", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["usual", "saturated"])
def test_it_equals_float64(K, scale):
    query, key, value, allowed = arrays(4, K, scale=scale)
    out, weights = expected(query, key, value, allowed)
    got = attention_weights(query, key, allowed)
    assert got.dtype == jnp.float32
    # Scores of the size s carry a rounding error of s * 2^-24 and weights the same.
    tolerance = 2e-6 * scale**2
    np.testing.assert_allclose(np.reshape(got, weights.shape), weights, rtol=0, atol=tolerance)
    np.testing.assert_allclose(attend(query, key, value, allowed), out, rtol=0, atol=tolerance * scale)


def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    query, key, value, allowed = arrays(2, 1)

    def total(query, key, value):
        return jnp.sum(jnp.sin(attend(query, key, value, allowed)))

    out = attend(query, key, value, allowed)
    assert (out[0, :, 2] == 0).all() and (out[1] == 0).all() and (out[0, :, 0] != 0).any()
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value):
        assert np.isfinite(gradient).all() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_a_key_that_is_not_allowed_has_no_weight_however_large_its_score():
    query, key, value, allowed = arrays(2, 2)
    hidden = ~allowed.any(axis=1)
    hidden[0, 3], allowed[0, :, 3] = True, False
    huge = np.where(hidden[:, None, :, None], np.float32(1e30), key)
    np.testing.assert_array_equal(attend(query, huge, value, allowed), attend(query, key, value, allowed))


def test_the_values_decide_the_dtype_and_the_softmax_stays_in_float32():
    query, key, value, allowed = arrays(4, 2)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    assert attend(*half, allowed).dtype == jnp.bfloat16
    weights = attention_weights(*half[:2], allowed)
    total = np.asarray(weights.sum(-1)).reshape(B, 4, T)
    np.testing.assert_allclose(total, np.broadcast_to(allowed.any(-1)[:, None], total.shape), rtol=0, atol=1e-6)
