"""Attention over positions that are split over devices, each of which gathers the keys of all for its own queries.

Quicker than a ring (`ring.py`) where there is room for the keys of one layer: one transfer, and whatever blocks a mask
leaves empty are skipped at once. What is kept for the backward pass is the device's own; keys are gathered again.
Context parallelism as in Llama 3 (2407.21783), section 3.3.2.
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import Meta
from polygpt.attention.scores import Terms


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    rule: Rule, backend: ModuleType, axes: str | tuple[str, ...], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT) of this device's queries over the keys of all; to be called inside `jax.shard_map`.

    Arguments as of `ring.attend`. Of a backend without `gradients`, call `attend` with `whole(operands, axes)`.
    """
    return backend.attend(rule, whole(operands, axes))


def whole(operands: Operands, axes: str | tuple[str, ...]) -> Operands:
    """This device's queries, and the keys of all."""

    def gather(x, axis):
        return jax.lax.all_gather(x, axes, axis=axis, tiled=True)

    terms = operands.terms
    return Operands(
        operands.query_BHTd,
        gather(operands.key_BKSd, 2),
        gather(operands.value_BKSe, 2),
        operands.query,
        Meta(*gather(jnp.stack(jax.tree.leaves(operands.key)), 2)),
        Terms(terms.head, terms.query, {name: gather(x, 2) for name, x in terms.key.items()}, terms.pair),
    )


def _forward(rule, backend, axes, operands):
    y_BHTe, lse_BHT = attend(rule, backend, axes, operands)
    return (y_BHTe, lse_BHT), (operands, y_BHTe, lse_BHT)


def _backward(rule, backend, axes, kept, cotangents):
    operands, y_BHTe, lse_BHT = kept
    dy_BHTe, dlse_BHT = cotangents
    delta_BHT = jnp.sum(dy_BHTe.astype(jnp.float32) * y_BHTe.astype(jnp.float32), axis=-1) - dlse_BHT
    own = backend.gradients(rule, whole(operands, axes), lse_BHT, dy_BHTe, delta_BHT)

    def home(x):
        total = jax.lax.psum_scatter(x.astype(jnp.float32), axes, scatter_dimension=2, tiled=True)
        return total.astype(x.dtype)

    terms = dataclasses.replace(own.terms, key={name: home(x) for name, x in own.terms.key.items()})
    return (Operands(own.query_BHTd, home(own.key_BKSd), home(own.value_BKSe), None, None, terms),)


attend.defvjp(_forward, _backward)
