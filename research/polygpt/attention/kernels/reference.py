"""Softmax attention, materialised: plain, exact, the measure of every other backend."""

import jax
import jax.numpy as jnp


def attention_weights(query_BHTd: jax.Array, key_BKSd: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) over the allowed keys. Vaswani et al. (1706.03762), eq. 1.

    Each of the K key heads serves H / K successive query heads (Ainslie et al., GQA, 2305.13245).

    Returns:
        float32 [B, K, H/K, T, S]; a query that may see nothing has weights of zero.
    """
    B, H, T, d = query_BHTd.shape
    K = key_BKSd.shape[1]
    grouped = query_BHTd.reshape(B, K, H // K, T, d) * jnp.asarray(d**-0.5, query_BHTd.dtype)
    score = jnp.einsum("bkgtd,bksd->bkgts", grouped, key_BKSd, preferred_element_type=jnp.float32)
    score = jnp.where(allowed_BTS[:, None, None], score, -jnp.inf)
    # A query without keys has a maximum of -inf, and inf - inf would be NaN: it is shifted by 0 and divided by 1 instead.
    largest = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
    exponential = jnp.exp(score - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = jnp.sum(exponential, axis=-1, keepdims=True)
    return exponential / jnp.where(total == 0.0, 1.0, total)


def attend(query_BHTd: jax.Array, key_BKSd: jax.Array, value_BKSd: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    """The weighted mean of the values, [B, H, T, d] in the dtype of the values."""
    weights = attention_weights(query_BHTd, key_BKSd, allowed_BTS).astype(value_BKSd.dtype)
    return jnp.einsum("bkgts,bksd->bkgtd", weights, value_BKSd).reshape(query_BHTd.shape)
