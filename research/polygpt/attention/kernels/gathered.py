"""Sequence-parallel attention by all-gather: each device gathers all keys for its own queries.

Faster than a ring (`ring.py`) if the keys of one layer fit into memory: it needs one transfer, and skips all empty
blocks of the mask. The backward pass keeps only the device's own keys and gathers them again. Context parallelism as in
Llama 3 (2407.21783), section 3.3.2.
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.scores import Terms
from polygpt.nn.remat import costly


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    rule: Rule, backend: ModuleType, axes: str | tuple[str, ...], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT) of this device's queries over all keys; call it inside `jax.shard_map`.

    Arguments as in `ring.attend`. For a backend without `gradients`, call its `attend` with `gather_keys(operands,
    axes)`.
    """
    return backend.attend(rule, gather_keys(operands, axes))


def gather_keys(operands: Operands, axes: str | tuple[str, ...]) -> Operands:
    """This device's queries with the keys of all devices."""

    def gather(x, axis):
        return jax.lax.all_gather(x, axes, axis=axis, tiled=True)

    terms = operands.terms
    return Operands(
        operands.query_BHTd,
        gather(operands.key_BKSd, 2),
        gather(operands.value_BKSe, 2),
        operands.query,
        jax.tree.unflatten(jax.tree.structure(operands.key), gather(jnp.stack(jax.tree.leaves(operands.key)), 2)),
        Terms(terms.head, terms.query, {name: gather(x, 2) for name, x in terms.key.items()}, terms.pair),
    )


def _forward(rule, backend, axes, operands):
    y_BHTe, lse_BHT = costly(attend(rule, backend, axes, operands))
    return (y_BHTe, lse_BHT), (operands, y_BHTe, lse_BHT)


def _backward(rule, backend, axes, kept, cotangents):
    operands, y_BHTe, lse_BHT = kept
    dy_BHTe, dlse_BHT = cotangents
    delta_BHT = jnp.sum(dy_BHTe.astype(jnp.float32) * y_BHTe.astype(jnp.float32), axis=-1) - dlse_BHT
    own = backend.gradients(rule, gather_keys(operands, axes), lse_BHT, dy_BHTe, delta_BHT)

    def reduce_scatter(x):
        total = jax.lax.psum_scatter(x.astype(jnp.float32), axes, scatter_dimension=2, tiled=True)
        return total.astype(x.dtype)

    terms = dataclasses.replace(own.terms, key={name: reduce_scatter(x) for name, x in own.terms.key.items()})
    key_BKSd, value_BKSe = reduce_scatter(own.key_BKSd), reduce_scatter(own.value_BKSe)
    return (Operands(own.query_BHTd, key_BKSd, value_BKSe, None, None, terms),)


attend.defvjp(_forward, _backward)
