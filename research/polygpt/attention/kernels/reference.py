"""Softmax attention, materialised: plain, exact, the measure of every other backend.

The order of the axes in the products is chosen for the CPU. XLA transposes an operand of a batched product that is
contracted over its first matrix axis; with keys and values turned to [.., d, S] that happens, forward and backward, to
the small arrays of heads alone and never to the [.., T, S] weights. Groups of heads are folded into T for the same
reason.
"""

import jax
import jax.numpy as jnp


def attention_weights(query_BHTd: jax.Array, key_BKSd: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) over the allowed keys. Vaswani et al. (1706.03762), eq. 1.

    Each of the K key heads serves H / K successive query heads (Ainslie et al., GQA, 2305.13245).

    Returns:
        float32 [B, H, T, S]; a query that may see nothing has weights of zero.
    """
    B, H, T, d = query_BHTd.shape
    K, S = key_BKSd.shape[1:3]
    scaled = query_BHTd * jnp.asarray(d**-0.5, query_BHTd.dtype)
    score = jnp.einsum(
        "bktd,bkds->bkts",
        scaled.reshape(B, K, H // K * T, d),
        key_BKSd.swapaxes(2, 3),
        preferred_element_type=jnp.float32,
    ).reshape(B, H, T, S)
    allowed_B1TS = allowed_BTS[:, None]
    # The lowest finite number, not -inf: softmax of a row without keys stays finite, and so does its gradient.
    score = jnp.where(allowed_B1TS, score, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(score, axis=-1) * jnp.any(allowed_B1TS, axis=-1, keepdims=True)


def attend(query_BHTd: jax.Array, key_BKSd: jax.Array, value_BKSd: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    """The weighted mean of the values, [B, H, T, d] in the dtype of the values."""
    B, H, T, d = query_BHTd.shape
    K, S = key_BKSd.shape[1:3]
    weights = attention_weights(query_BHTd, key_BKSd, allowed_BTS).astype(value_BKSd.dtype)
    y = jnp.einsum("bkts,bkds->bktd", weights.reshape(B, K, H // K * T, S), value_BKSd.swapaxes(2, 3))
    return y.reshape(B, H, T, d)
