"""Attention, materialised: plain, exact, the measure of every other backend.

The order of the axes in the products is chosen for the CPU. XLA transposes an operand of a batched product that is
contracted over its first matrix axis; with keys and values turned to [.., d, S] that happens, forward and backward, to
the small arrays of heads alone and never to the [.., T, S] weights. Groups of heads are folded into T for the same
reason.
"""

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.problem import Operands, Rule

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Stands for -inf: softmax of a row without keys stays finite, and so does its gradient."""


def refuses(rule: Rule, operands: Operands) -> None:
    """It computes everything."""
    return None


def masked_scores(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Modified scores, float32 [B, H, T, S], and where they may be seen, bool [B, 1, T, S]; LOWEST elsewhere."""
    B, H, T, d = operands.query_BHTd.shape
    K, S = operands.key_BKSd.shape[1:3]
    score_BHTS = jnp.einsum(
        "bktd,bkds->bkts",
        operands.query_BHTd.reshape(B, K, H // K * T, d),
        operands.key_BKSd.swapaxes(2, 3),
        preferred_element_type=jnp.promote_types(jnp.float32, operands.query_BHTd.dtype),
    ).reshape(B, H, T, S)
    query, key, terms = operands.views()
    visible_B1TS = rule.visible(query, key)
    return jnp.where(visible_B1TS, rule.score(score_BHTS, query, key, terms), LOWEST), visible_B1TS


def normalized(rule: Rule, score_BHTS: jax.Array, visible_B1TS: jax.Array) -> jax.Array:
    """The weights, float32 [B, H, T, S]; zeros for a query that may see nothing."""
    if rule.normalizer == "sigmoid":
        return jax.nn.sigmoid(score_BHTS) * visible_B1TS
    return jax.nn.softmax(score_BHTS, axis=-1) * jnp.any(visible_B1TS, axis=-1, keepdims=True)


def attention_weights(rule: Rule, operands: Operands) -> jax.Array:
    """normalizer(score(q k^T)) over the visible keys, float32 [B, H, T, S]. Vaswani et al. (1706.03762), eq. 1."""
    return normalized(rule, *masked_scores(rule, operands))


def weighted_values(weights_BHTS: jax.Array, value_BKSe: jax.Array) -> jax.Array:
    """[B, H, T, e] in the dtype of the values."""
    B, H, T, S = weights_BHTS.shape
    K, e = value_BKSe.shape[1], value_BKSe.shape[3]
    weights = weights_BHTS.astype(value_BKSe.dtype).reshape(B, K, H // K * T, S)
    return jnp.einsum("bkts,bkds->bktd", weights, value_BKSe.swapaxes(2, 3)).reshape(B, H, T, e)


def attend(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), as the folder's `problem.py` says."""
    score_BHTS, visible_B1TS = masked_scores(rule, operands)
    y_BHTe = weighted_values(normalized(rule, score_BHTS, visible_B1TS), operands.value_BKSe)
    if rule.normalizer == "sigmoid":
        return y_BHTe, jnp.zeros(y_BHTe.shape[:3], jnp.float32)
    return y_BHTe, jax.nn.logsumexp(score_BHTS, axis=-1)
