"""Experts on several devices: how positions come to the devices of their experts and back.

GShard (Lepikhin et al., 2006.16668), section 3.2: rows are split over all devices, experts over those of one axis of
the mesh. Buffers of a fixed size are exchanged all-to-all. Without buffers the rows of the devices that share the
experts are gathered, each device computes what falls to its own experts, and the sums are scattered back: nothing has
to be known of how many positions an expert gets, and if one device gets them all none is lost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from polygpt.nn.grouping import through_sorted
from polygpt.nn.router import Choice
from polygpt.sharding import active, mesh_axes, using

Kernels = tuple[jax.Array, jax.Array, jax.Array]
"""gate and up [E, D, F], down [E, F, D]."""


def at_rows(x_BECD: jax.Array) -> jax.Array:
    """Every device has all experts' buffers of its own rows; places are split as positions are."""
    return _buffers(x_BECD, "batch", None, "positions", None)


def at_experts(x_BECD: jax.Array, features: str | None = None) -> jax.Array:
    """Every device has its own experts' buffers of the rows of all that share them."""
    return _buffers(x_BECD, "batch", "experts", "positions", features)


def _buffers(x_BECD, *logical):
    layout = active()
    if layout is None:
        return x_BECD
    rows, experts, *rest = layout.axes(logical, x_BECD.shape)
    # What splits the experts cannot split the rows too.
    rows = tuple(axis for axis in mesh_axes(rows) if axis not in mesh_axes(experts))
    return jax.lax.with_sharding_constraint(x_BECD, NamedSharding(layout.mesh, PartitionSpec(rows, experts, *rest)))


def dropless(
    x_BTD: jax.Array, choice: Choice, kernels: Kernels, function: Callable[[Kernels, jax.Array, Callable], jax.Array]
) -> jax.Array:
    """`through_sorted`, in the dtype of x, over the devices of the active layout.

    `function(kernels, x_ND, grouped)` computes the experts whose kernels it is given.
    """
    layout = active()
    if layout is None:
        return _sorted(x_BTD, choice, kernels, function)
    rows, positions, _ = layout.axes(("batch", "positions", None), x_BTD.shape)
    at_home = PartitionSpec(rows, positions, None)
    experts, _, hidden = layout.axes(("experts", None, "hidden"), kernels[0].shape)
    inward, outward = PartitionSpec(experts, None, hidden), PartitionSpec(experts, hidden, None)
    gathered = tuple(axis for axis in mesh_axes(experts) if axis in mesh_axes(rows))
    summed = tuple(axis for axis in (*mesh_axes(experts), *mesh_axes(hidden)) if axis not in gathered)

    def of_one_device(x_BTD, choice, kernels):
        own = len(kernels[0])
        if gathered:
            x_BTD, choice = jax.tree.map(lambda x: jax.lax.all_gather(x, gathered, axis=0, tiled=True), (x_BTD, choice))
        if experts is not None:
            local_BTk = choice.expert_BTk - own * jax.lax.axis_index(experts)
            mine_BTk = (local_BTk >= 0) & (local_BTk < own)
            choice = Choice(jnp.where(mine_BTk, local_BTk, own), choice.weight_BTk)
        with using(None):
            y_BTD = _sorted(x_BTD, choice, kernels, function)
        if summed:
            y_BTD = jax.lax.psum(y_BTD, summed)
        if gathered:
            y_BTD = jax.lax.psum_scatter(y_BTD, gathered, scatter_dimension=0, tiled=True)
        return y_BTD

    choices = Choice(at_home, at_home)
    specs = {"in_specs": (at_home, choices, (inward, inward, outward)), "out_specs": at_home}
    # Unchecked, because what `ragged_dot` says of how it varies over devices under `vmap` is not what blocks say.
    return jax.shard_map(of_one_device, mesh=layout.mesh, check_vma=False, **specs)(x_BTD, choice, kernels)


def _sorted(x_BTD, choice, kernels, function):
    def compute(x_ND, grouped):
        return function(kernels, x_ND, grouped)

    return through_sorted(x_BTD, choice, len(kernels[0]), compute).astype(x_BTD.dtype)
