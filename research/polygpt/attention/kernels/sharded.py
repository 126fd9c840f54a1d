"""Attention on many devices: each computes some rows and heads and, with sequence parallelism, some positions.

The compiler partitions plain XLA by itself, but it cannot partition kernels, and to attend to keys on other devices it
can only gather them all. This module therefore writes the program of one device explicitly, for `jax.shard_map`.

Heads: each of n devices has H / n successive query heads and their key heads. If n does not divide the K key heads,
key heads are repeated to lcm(K, n) in total; if n is a multiple of K, each device has one, shared by its H / n query
heads.

Positions: each device all-gathers keys for its own queries (`gathered.py`), or keys travel around a ring (`ring.py`).
Both read the order of positions from metadata, so that it may be a zigzag (`attention/zigzag.py`).
If the devices do not divide both queries and keys, as in a decode step, only rows and heads are split.
"""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from polygpt import sharding
from polygpt.attention.kernels import gathered, ring
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.scores import Terms
from polygpt.errors import SpecError


def attend(
    rule: Rule, operands: Operands, layout: sharding.MeshLayout, choose: Callable[[Rule, Operands, bool], ModuleType]
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), see `problem.py`, of arrays that the layout splits.

    Args:
        rule, operands: the global problem.
        layout: the mesh and its table.
        choose: returns the backend for the problem of one device; the last argument says whether the keys are a part.
    """
    (B, H, T, _), S = operands.query_BHTd.shape, operands.key_BKSd.shape[2]
    rows, heads, positions = layout.partition_spec(("batch", "heads", "positions"), (B, H, math.gcd(T, S)))
    if operands.terms.pair and positions and layout.spec.context == "ring":
        raise SpecError(
            "pair terms are stored with their queries and cannot follow keys around a ring: set train.mesh.context to "
            "gather"
        )
    rule = dataclasses.replace(rule, staged=layout.size("stages") > 1)
    if layout.zigzag and positions:
        rule = dataclasses.replace(rule, run=T // (2 * layout.size("positions")))
    operands = _repeat_key_heads(operands, math.prod(layout.mesh.shape[axis] for axis in sharding.mesh_axes(heads)))
    of_queries, of_positions = P(rows, heads, positions), P(rows, positions)
    terms = operands.terms
    split = Operands(
        of_queries,
        of_queries,
        of_queries,
        of_positions,
        of_positions,
        Terms({name: P(*[None] * (x.ndim - 1), heads) for name, x in terms.head.items()}, *[of_queries] * 4),
    )

    def per_device(operands):
        with sharding.use_layout(None):
            if not positions:
                return choose(rule, operands, False).attend(rule, operands)
            if layout.spec.context == "ring":
                return ring.attend(rule, choose(rule, operands, True), positions, operands)
            shapes = jax.eval_shape(lambda operands: gathered.gather_keys(operands, positions), operands)
            backend = choose(rule, shapes, False)
            if hasattr(backend, "gradients"):
                return gathered.attend(rule, backend, positions, operands)
            return backend.attend(rule, gathered.gather_keys(operands, positions))

    split_attend = jax.shard_map(
        per_device, mesh=layout.mesh, in_specs=(split,), out_specs=(of_queries, of_queries), check_vma=False
    )
    return split_attend(operands)


def _repeat_key_heads(operands: Operands, devices: int) -> Operands:
    """Repeats key heads until the devices divide their number; each keeps serving the same query heads."""
    K = operands.key_BKSd.shape[1]
    times = math.lcm(K, devices) // K
    if times == 1:
        return operands
    keys, values = (jnp.repeat(x, times, axis=1) for x in (operands.key_BKSd, operands.value_BKSe))
    return Operands(operands.query_BHTd, keys, values, operands.query, operands.key, operands.terms)
