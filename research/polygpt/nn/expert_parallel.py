"""Expert parallelism: send positions to the devices that hold their experts, and back.

GShard (Lepikhin et al., 2006.16668), section 3.2: rows are split over all devices, experts over one mesh axis.
With a capacity, fixed-size buffers are exchanged all-to-all. Without one (dropless), the rows of all devices along
the expert axis are all-gathered, each device computes its own experts, and the sums are reduce-scattered. This needs
no bound on the positions per expert: nothing is dropped even if one expert gets all of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from polygpt.nn.grouping import through_sorted
from polygpt.nn.router import Routing
from polygpt.sharding import active, mesh_axes, use_layout

Kernels = tuple[jax.Array, jax.Array, jax.Array]
"""gate and up [E, D, F], down [E, F, D]."""


def at_rows(x_BECD: jax.Array) -> jax.Array:
    """Each device holds the buffers of all experts for its own rows; slots are split like positions."""
    return _buffers(x_BECD, "batch", None, "positions", None)


def at_experts(x_BECD: jax.Array, features: str | None = None) -> jax.Array:
    """Each device holds the buffers of its own experts for the rows of all devices along the expert axis."""
    return _buffers(x_BECD, "batch", "experts", "positions", features)


def _buffers(x_BECD, *logical):
    layout = active()
    if layout is None:
        return x_BECD
    rows, experts, *rest = layout.partition_spec(logical, x_BECD.shape)
    # A mesh axis that splits the experts cannot split the rows too.
    rows = tuple(axis for axis in mesh_axes(rows) if axis not in mesh_axes(experts))
    return jax.lax.with_sharding_constraint(x_BECD, NamedSharding(layout.mesh, PartitionSpec(rows, experts, *rest)))


def dropless(
    x_BTD: jax.Array, routing: Routing, kernels: Kernels, function: Callable[[Kernels, jax.Array, Callable], jax.Array]
) -> jax.Array:
    """`through_sorted`, in the dtype of x, on the devices of the active layout.

    `function(kernels, x_ND, grouped)` applies the experts that own the given kernels.
    """
    layout = active()
    if layout is None:
        return _sorted(x_BTD, routing, kernels, function)
    rows, positions, _ = layout.partition_spec(("batch", "positions", None), x_BTD.shape)
    local = PartitionSpec(rows, positions, None)
    experts, _, hidden = layout.partition_spec(("experts", None, "hidden"), kernels[0].shape)
    inward, outward = PartitionSpec(experts, None, hidden), PartitionSpec(experts, hidden, None)
    gathered = tuple(axis for axis in mesh_axes(experts) if axis in mesh_axes(rows))
    summed = tuple(axis for axis in (*mesh_axes(experts), *mesh_axes(hidden)) if axis not in gathered)

    def per_device(x_BTD, routing, kernels):
        own = len(kernels[0])
        if gathered:
            x_BTD, routing = jax.tree.map(
                lambda x: jax.lax.all_gather(x, gathered, axis=0, tiled=True), (x_BTD, routing)
            )
        if experts is not None:
            local_BTk = routing.expert_BTk - own * jax.lax.axis_index(experts)
            mine_BTk = (local_BTk >= 0) & (local_BTk < own)
            routing = Routing(jnp.where(mine_BTk, local_BTk, own), routing.weight_BTk)
        with use_layout(None):
            y_BTD = _sorted(x_BTD, routing, kernels, function)
        if summed:
            y_BTD = jax.lax.psum(y_BTD, summed)
        if gathered:
            y_BTD = jax.lax.psum_scatter(y_BTD, gathered, scatter_dimension=0, tiled=True)
        return y_BTD

    routings = Routing(local, local)
    specs = {"in_specs": (local, routings, (inward, inward, outward)), "out_specs": local}
    # check_vma=False: under `vmap`, `ragged_dot` and the CPU blocks disagree on which axes their results vary over.
    return jax.shard_map(per_device, mesh=layout.mesh, check_vma=False, **specs)(x_BTD, routing, kernels)


def _sorted(x_BTD, routing, kernels, function):
    def compute(x_ND, grouped):
        return function(kernels, x_ND, grouped)

    return through_sorted(x_BTD, routing, len(kernels[0]), compute).astype(x_BTD.dtype)
