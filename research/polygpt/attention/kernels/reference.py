"""Materialised attention: plain and exact, the reference for all other backends.

The axis order of the products is chosen for CPU. XLA transposes an operand of a batched product that is contracted over
its first matrix axis. With keys and values transposed to [.., d, S], this affects only the small per-head arrays,
forward and backward, and never the [.., T, S] weights. Groups of heads are folded into T for the same reason.
"""

import dataclasses

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.problem import LOWEST, Operands, Rule


def refuses(rule: Rule, operands: Operands) -> None:
    """Never: it supports every problem."""
    return None


def masked_scores(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Modified scores, float32 [B, H, T, S], LOWEST where masked; and visibility, bool [B, 1, T, S]."""
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
    """The weights, float32 [B, H, T, S]; zeros for a query without visible keys."""
    if rule.normalizer == "sigmoid":
        return jax.nn.sigmoid(score_BHTS) * visible_B1TS
    return jax.nn.softmax(score_BHTS, axis=-1) * jnp.any(visible_B1TS, axis=-1, keepdims=True)


def attention_weights(rule: Rule, operands: Operands) -> jax.Array:
    """normalizer(score(q k^T)) over the visible keys, float32 [B, H, T, S]. Vaswani et al. (1706.03762), eq. 1."""
    return normalized(rule, *masked_scores(rule, operands))


def weights_and_lse(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`attention_weights`, and lse as in `problem.py`, of the same scores."""
    score_BHTS, visible_B1TS = masked_scores(rule, operands)
    weights_BHTS = normalized(rule, score_BHTS, visible_B1TS)
    if rule.normalizer == "sigmoid":
        return weights_BHTS, jnp.zeros(weights_BHTS.shape[:3], jnp.float32)
    return weights_BHTS, jax.nn.logsumexp(score_BHTS, axis=-1)


def weighted_values(weights_BHTS: jax.Array, value_BKSe: jax.Array) -> jax.Array:
    """[B, H, T, e] in the dtype of the values."""
    B, H, T, S = weights_BHTS.shape
    K, e = value_BKSe.shape[1], value_BKSe.shape[3]
    weights = weights_BHTS.astype(value_BKSe.dtype).reshape(B, K, H // K * T, S)
    return jnp.einsum("bkts,bkds->bktd", weights, value_BKSe.swapaxes(2, 3)).reshape(B, H, T, e)


def attend(rule: Rule, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`."""
    weights_BHTS, lse_BHT = weights_and_lse(rule, operands)
    return weighted_values(weights_BHTS, operands.value_BKSe), lse_BHT


def gradients(rule: Rule, operands: Operands, lse_BHT: jax.Array, dy_BHTe: jax.Array, delta_BHT: jax.Array) -> Operands:
    """The gradients' share that is due to these keys, see `problem.py`."""

    def scored(query_BHTd, key_BKSd, terms):
        return masked_scores(rule, dataclasses.replace(operands, query_BHTd=query_BHTd, key_BKSd=key_BKSd, terms=terms))

    arrays = operands.query_BHTd, operands.key_BKSd, operands.terms
    score_BHTS, pull_scores, visible_B1TS = jax.vjp(scored, *arrays, has_aux=True)
    if rule.normalizer == "sigmoid":
        weight_BHTS = normalized(rule, score_BHTS, visible_B1TS)
    else:
        weight_BHTS = jnp.where(visible_B1TS, jnp.exp(score_BHTS - lse_BHT[..., None]), 0)
    dweight_BHTS, dvalue_BKSe = jax.vjp(weighted_values, weight_BHTS, operands.value_BKSe)[1](dy_BHTe)
    away_BHTS = weight_BHTS * dweight_BHTS if rule.normalizer == "sigmoid" else delta_BHT[..., None]
    dquery_BHTd, dkey_BKSd, dterms = pull_scores(weight_BHTS * (dweight_BHTS - away_BHTS))
    return Operands(dquery_BHTd, dkey_BKSd, dvalue_BKSe, None, None, dterms)
