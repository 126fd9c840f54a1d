"""Sequence-parallel attention in a ring of devices: no device ever holds all keys.

Each device keeps its queries; keys and values, with their metadata and terms, are passed from device to device until
every device has seen all of them. Liu et al., Ring Attention (2310.01889), section 3. Masks depend only on metadata,
not on location, so packed rows, spans and padding run the same program as plain causal rows.

Partial results are combined by their sums of exponentials: with lse = log sum_i exp(lse_i), the softmax over all keys
is y = sum_i exp(lse_i - lse) y_i. In the backward pass the keys travel around the ring again together with their
gradients, which return to their owner after the last step. The forward pass saves y, lse and the device's own operands;
the gradients of a part need nothing else from the other parts, see `problem.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.problem import LOWEST, Operands, Rule
from polygpt.attention.scores import Terms
from polygpt.nn.remat import costly


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    rule: Rule, backend: ModuleType, axes: str | tuple[str, ...], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT) of this device's queries over all keys; call it inside `jax.shard_map`.

    Args:
        rule: the static half of the problem.
        backend: computes the parts; must have `gradients`.
        axes: the mesh axes that split the positions.
        operands: this device's queries and keys.
    """
    return _forward(rule, backend, axes, operands)[0]


def _forward(rule, backend, axes, operands):
    def visit(keys, results):
        return _combine(rule, results, backend.attend(rule, _with_keys(operands, keys)))

    B, H, T, _ = operands.query_BHTd.shape
    value = operands.value_BKSe
    empty = jnp.zeros((B, H, T, value.shape[3])), jnp.full((B, H, T), 0.0 if rule.normalizer == "sigmoid" else LOWEST)
    y_BHTe, lse_BHT = _around_ring(axes, _keys(operands), empty, visit)
    y_BHTe, lse_BHT = costly((y_BHTe.astype(value.dtype), lse_BHT))
    return (y_BHTe, lse_BHT), (operands, y_BHTe, lse_BHT)


def _backward(rule, backend, axes, kept, cotangents):
    operands, y_BHTe, lse_BHT = kept
    dy_BHTe, dlse_BHT = cotangents
    delta_BHT = jnp.sum(dy_BHTe.astype(jnp.float32) * y_BHTe.astype(jnp.float32), axis=-1) - dlse_BHT

    def visit(keys, sums):
        of_keys, of_others = sums
        # Receive the previous device's sums while computing the gradients to add to them.
        of_keys = _pass_on(axes, of_keys)
        here = _parts(backend.gradients(rule, _with_keys(operands, keys), lse_BHT, dy_BHTe, delta_BHT))
        return jax.tree.map(jnp.add, (of_keys, of_others), here)

    own = _parts(operands)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own)
    of_keys, of_others = _around_ring(axes, _keys(operands), zeros, visit)
    sums = _pass_on(axes, of_keys), of_others  # the last step leaves them one device short of their owner
    (key, value, of_key), (query, of_query, of_head) = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, own)
    return (Operands(query, key, value, None, None, Terms(of_head, of_query, of_key)),)


attend.defvjp(_forward, _backward)


def _around_ring(axes, keys: Any, state: Any, visit: Callable[[Any, Any], Any]) -> Any:
    """The state after `state = visit(keys, state)` with the keys of every device, its own first.

    Keys are sent to the next device while they are being processed, so that communication and computation overlap.
    """

    def step(_, carry):
        keys, state = carry
        return _pass_on(axes, keys), visit(keys, state)

    keys, state = jax.lax.fori_loop(0, jax.lax.axis_size(axes) - 1, step, (keys, state))
    return visit(keys, state)


def _pass_on(axes, arrays):
    """Sends the arrays to the next device; returns those of the previous one."""
    size = jax.lax.axis_size(axes)
    return jax.lax.ppermute(arrays, axes, [(i, (i + 1) % size) for i in range(size)])


def _combine(rule, one, other):
    """Combines the results over two sets of keys, in float32."""
    (y_BHTe, lse_BHT), (other_BHTe, other_BHT) = one, other
    if rule.normalizer == "sigmoid":
        return y_BHTe + other_BHTe, lse_BHT
    # If neither has visible keys, lse stays very negative and y zero.
    top_BHT = jnp.maximum(lse_BHT, other_BHT)
    part_BHT, other_part_BHT = jnp.exp(lse_BHT - top_BHT), jnp.exp(other_BHT - top_BHT)
    total_BHT = part_BHT + other_part_BHT
    y_BHTe = y_BHTe * (part_BHT / total_BHT)[..., None] + other_BHTe * (other_part_BHT / total_BHT)[..., None]
    return y_BHTe, top_BHT + jnp.log(total_BHT)


def _keys(operands: Operands):
    """The arrays to pass on. Metadata is stacked into one array, because a TPU transfers only a few at a time."""
    return operands.key_BKSd, operands.value_BKSe, jnp.stack(jax.tree.leaves(operands.key)), operands.terms.key


def _with_keys(operands: Operands, keys) -> Operands:
    """The problem of these queries with other keys."""
    key_BKSd, value_BKSe, meta_nBS, terms = keys
    terms, key = dataclasses.replace(operands.terms, key=terms), jax.tree.structure(operands.key).unflatten(meta_nBS)
    return dataclasses.replace(operands, key_BKSd=key_BKSd, value_BKSe=value_BKSe, key=key, terms=terms)


def _parts(operands: Operands):
    """The differentiable arrays: (key, value, key terms), (query, query terms, head terms)."""
    terms = operands.terms
    return (operands.key_BKSd, operands.value_BKSe, terms.key), (operands.query_BHTd, terms.query, terms.head)
