"""Attention on many devices: each computes some rows and some heads, and, where rows are long, some of the positions.

The compiler splits what is written in XLA by itself, but it refuses to split a kernel, and knows no way to attend to
keys that lie elsewhere but to gather them all. So the program of one device is written down here, for `jax.shard_map`.

Heads: a device has H / n successive query heads and the key heads that they look at. Where n devices are more than the
K key heads, or do not divide them, each key head is repeated until they do, lcm(K, n) in all: for n a multiple of K
that is one a device, and H / n query heads share it.

Positions: each device gathers the keys of all for its own queries (`gathered.py`), or they travel in a ring
(`ring.py`). Where the devices do not divide both queries and keys, as in a decode step, rows and heads alone are split.
"""

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
    rule: Rule, operands: Operands, layout: sharding.Layout, choose: Callable[[Rule, Operands, bool], ModuleType]
) -> tuple[jax.Array, jax.Array]:
    """(y_BHTe, lse_BHT), as `problem.py` says, of arrays that the layout splits.

    Args:
        rule, operands: the whole problem.
        layout: the mesh and its table.
        choose: gives the backend for the problem of one device; the last argument says that the keys are a part.
    """
    (B, H, T, _), S = operands.query_BHTd.shape, operands.key_BKSd.shape[2]
    rows, heads, positions = layout.axes(("batch", "heads", "positions"), (B, H, math.gcd(T, S)))
    if operands.terms.pair and positions and layout.spec.context == "ring":
        raise SpecError(
            "terms of pairs lie with their queries, and in a ring keys travel: set train.mesh.context gather"
        )
    operands = _repeated(operands, math.prod(layout.mesh.shape[axis] for axis in sharding.mesh_axes(heads)))
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

    def here(operands):
        with sharding.using(None):
            if not positions:
                return choose(rule, operands, False).attend(rule, operands)
            if layout.spec.context == "ring":
                return ring.attend(rule, choose(rule, operands, True), positions, operands)
            backend = choose(
                rule, jax.eval_shape(lambda operands: gathered.whole(operands, positions), operands), False
            )
            if hasattr(backend, "gradients"):
                return gathered.attend(rule, backend, positions, operands)
            return backend.attend(rule, gathered.whole(operands, positions))

    split_attend = jax.shard_map(
        here, mesh=layout.mesh, in_specs=(split,), out_specs=(of_queries, of_queries), check_vma=False
    )
    return split_attend(operands)


def _repeated(operands: Operands, devices: int) -> Operands:
    """With so many key heads that the devices divide them; each still serves the query heads that it served."""
    K = operands.key_BKSd.shape[1]
    times = math.lcm(K, devices) // K
    if times == 1:
        return operands
    keys, values = (jnp.repeat(x, times, axis=1) for x in (operands.key_BKSd, operands.value_BKSe))
    return Operands(operands.query_BHTd, keys, values, operands.query, operands.key, operands.terms)
