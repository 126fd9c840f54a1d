"""Zigzag order of positions, which gives all devices that split a row the same share of causal attention.

If n devices hold successive parts of a row, the last one computes 2 n - 1 times the pairs of the first, and all wait
for it. In zigzag order a row is cut into 2 n chunks, and device i holds chunks i and 2 n - 1 - i. Llama 3
(2407.21783), section 3.3.2.

Only arrays are reordered. Masks, scores and position encodings read metadata, which are reordered too, so that results
are those of the row's own order. What reads neighbours in the arrays instead, such as a convolution, needs that order:
see `needs_order`. The decoder changes the order once per pass, before its blocks, and back after them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from polygpt import sharding
from polygpt.sharding import RESIDUAL, MeshLayout


def chunk_order(devices: int) -> tuple[int, ...]:
    """Which chunk of the row, of 2 n, lies where: 0, 2 n - 1, 1, 2 n - 2, and so on."""
    return tuple(chunk for i in range(devices) for chunk in (i, 2 * devices - 1 - i))


def reordered(x: jax.Array, devices: int) -> jax.Array:
    """Arrays [B, T, ...] in zigzag order. T must be a multiple of 2 n. For arrays that every device holds whole."""
    chunks = jnp.split(x, 2 * devices, axis=1)
    return jnp.concatenate([chunks[chunk] for chunk in chunk_order(devices)], axis=1)


def scattered(x_BTD: jax.Array, layout: MeshLayout) -> jax.Array:
    """The residual stream in zigzag order, by exchanging chunks between the devices that split its positions."""
    return _exchanged(x_BTD, layout, _scatter)


def restored(x_BTD: jax.Array, layout: MeshLayout) -> jax.Array:
    """The inverse of `scattered`."""
    return _exchanged(x_BTD, layout, _restore)


def needs_order(spec: Any) -> bool:
    """Whether a specification's module needs the positions of a row in the row's order.

    That is its field `in_order`. A class that defines `build` without saying so, as code written by others may, is
    taken to need it.
    """
    for cls in type(spec).__mro__:
        if "in_order" in vars(cls):
            return spec.in_order
        if "build" in vars(cls):
            return True
    return False


def largest_share(total: Callable[[int], float], length: int, devices: int, zigzag: bool) -> float:
    """The work of the busiest of n devices relative to the mean of all, at least 1.

    Args:
        total: the work for the first t positions of a row, by t.
        length: T, the number of positions of a row.
        devices: n.
        zigzag: whether positions are in zigzag order.
    """
    parts = 2 * devices
    ends = [total(length * i // parts) for i in range(parts + 1)]
    chunks = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    held = chunk_order(devices) if zigzag else range(parts)
    work = [chunks[one] + chunks[other] for one, other in zip(held[::2], held[1::2], strict=True)]
    return max(work) * devices / math.fsum(work) if any(work) else 1.0


def _exchanged(x_BTD, layout, exchange):
    spec = layout.partition_spec(RESIDUAL, x_BTD.shape)
    axes = sharding.mesh_axes(spec[1])

    def per_device(x_bhD):
        return exchange(x_bhD, axes)

    local = P(spec[0], spec[1], None)
    return jax.shard_map(per_device, mesh=layout.mesh, in_specs=local, out_specs=local, check_vma=False)(x_BTD)


# A device holds one chunk with an even number and one with an odd number, in either order. Even chunks go from one
# device each to one device each, and so do odd ones, so that either kind is one permutation.


def _scatter(x_bhD, axes):
    n, index = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    even, odd = (
        jax.lax.ppermute(half, axes, [(chunk // 2, min(chunk, 2 * n - 1 - chunk)) for chunk in range(first, 2 * n, 2)])
        for first, half in enumerate(jnp.split(x_bhD, 2, axis=1))
    )
    ahead = jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1)
    return jnp.where(index % 2 == 0, *ahead)  # the first chunk of device i has number i


def _restore(x_bhD, axes):
    n, index = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    first, second = jnp.split(x_bhD, 2, axis=1)
    even, odd = (jnp.where(index % 2 == parity, first, second) for parity in (0, 1))
    parts = (
        jax.lax.ppermute(half, axes, [(min(chunk, 2 * n - 1 - chunk), chunk // 2) for chunk in range(parity, 2 * n, 2)])
        for parity, half in ((0, even), (1, odd))
    )
    return jnp.concatenate(list(parts), axis=1)
