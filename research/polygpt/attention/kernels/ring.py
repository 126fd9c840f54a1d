"""Attention over positions that are split over devices in a ring: no device ever holds the keys of all.

Each device keeps its queries; keys and values, with their metadata and terms, travel from each device to the next until
all have met all. Liu et al., Ring Attention (2310.01889), section 3. A mask is asked of metadata, never of places, so
packed rows, spans and padding are the same program as plain causal rows.

Results over parts of the keys are joined by their sums of exponentials: with lse = log sum_i exp(lse_i), the softmax
over all keys is y = sum_i exp(lse_i - lse) y_i. Backward, the keys go round a second time and their gradients with
them, home again after the last step; of the forward pass y and lse are kept beside the device's own operands. A part's
gradients need nothing of the other parts but those two, see `problem.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.kernels.reference import LOWEST
from polygpt.attention.masks import Meta
from polygpt.attention.scores import Terms


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    rule: Rule, backend: ModuleType, axes: str | tuple[str, ...], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT) of this device's queries over the keys of all; to be called inside `jax.shard_map`.

    Args:
        rule: the static half of the problem.
        backend: computes the parts; it has `gradients`.
        axes: the mesh axes that positions are split over.
        operands: this device's queries and keys.
    """
    return _forward(rule, backend, axes, operands)[0]


def _forward(rule, backend, axes, operands):
    def meet(keys, results):
        return _joined(rule, results, backend.attend(rule, _with(operands, keys)))

    B, H, T, _ = operands.query_BHTd.shape
    value = operands.value_BKSe
    nothing = jnp.zeros((B, H, T, value.shape[3])), jnp.full((B, H, T), 0.0 if rule.normalizer == "sigmoid" else LOWEST)
    y_BHTe, lse_BHT = _round(axes, _keys(operands), nothing, meet)
    y_BHTe = y_BHTe.astype(value.dtype)
    return (y_BHTe, lse_BHT), (operands, y_BHTe, lse_BHT)


def _backward(rule, backend, axes, kept, cotangents):
    operands, y_BHTe, lse_BHT = kept
    dy_BHTe, dlse_BHT = cotangents
    delta_BHT = jnp.sum(dy_BHTe.astype(jnp.float32) * y_BHTe.astype(jnp.float32), axis=-1) - dlse_BHT

    def meet(keys, sums):
        of_keys, of_others = sums
        # Sums arrive, as those of the device before stand, while the gradients to be added are being computed.
        of_keys = _onward(axes, of_keys)
        here = _parts(backend.gradients(rule, _with(operands, keys), lse_BHT, dy_BHTe, delta_BHT))
        return jax.tree.map(jnp.add, (of_keys, of_others), here)

    own = _parts(operands)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own)
    of_keys, of_others = _round(axes, _keys(operands), zeros, meet)
    sums = _onward(axes, of_keys), of_others  # the last step was at the neighbour's
    (key, value, of_key), (query, of_query, of_head) = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, own)
    return (Operands(query, key, value, None, None, Terms(of_head, of_query, of_key)),)


attend.defvjp(_forward, _backward)


def _round(axes, keys: Any, state: Any, meet: Callable[[Any, Any], Any]) -> Any:
    """The state after `state = meet(keys, state)` with the keys of every device, its own first.

    Keys set out for the next device while they are being met, so that the network and the device work side by side.
    """

    def step(_, carry):
        keys, state = carry
        return _onward(axes, keys), meet(keys, state)

    keys, state = jax.lax.fori_loop(0, jax.lax.axis_size(axes) - 1, step, (keys, state))
    return meet(keys, state)


def _onward(axes, arrays):
    """Those of the device before."""
    size = jax.lax.axis_size(axes)
    return jax.lax.ppermute(arrays, axes, [(i, (i + 1) % size) for i in range(size)])


def _joined(rule, one, other):
    """Results over some keys and results over others, as results over both, in float32."""
    (y_BHTe, lse_BHT), (other_BHTe, other_BHT) = one, other
    if rule.normalizer == "sigmoid":
        return y_BHTe + other_BHTe, lse_BHT
    # Where neither sees anything lse stays the low number that it is, and y zero.
    top_BHT = jnp.maximum(lse_BHT, other_BHT)
    part_BHT, other_part_BHT = jnp.exp(lse_BHT - top_BHT), jnp.exp(other_BHT - top_BHT)
    total_BHT = part_BHT + other_part_BHT
    y_BHTe = y_BHTe * (part_BHT / total_BHT)[..., None] + other_BHTe * (other_part_BHT / total_BHT)[..., None]
    return y_BHTe, top_BHT + jnp.log(total_BHT)


def _keys(operands: Operands):
    """What travels, metadata as one array: a TPU has few arrays under way at a time, and the others wait."""
    return operands.key_BKSd, operands.value_BKSe, jnp.stack(jax.tree.leaves(operands.key)), operands.terms.key


def _with(operands: Operands, keys) -> Operands:
    """The problem of these queries and those keys."""
    key_BKSd, value_BKSe, meta_nBS, terms = keys
    terms = dataclasses.replace(operands.terms, key=terms)
    return dataclasses.replace(operands, key_BKSd=key_BKSd, value_BKSe=value_BKSe, key=Meta(*meta_nBS), terms=terms)


def _parts(operands: Operands):
    """What is differentiated: (key, value, terms of keys), (query, terms of queries, terms of heads)."""
    terms = operands.terms
    return (operands.key_BKSd, operands.value_BKSe, terms.key), (operands.query_BHTd, terms.query, terms.head)
