"""Losses that layers give beside their output, such as those of routers."""

import jax

Losses = dict[str, jax.Array]
"""By name float32 scalars, each a sum over real positions: so they add up over blocks, microbatches and devices."""


def add(*parts: Losses) -> Losses:
    """The sums by name; a name that a part lacks counts as 0 there."""
    names = {name: None for part in parts for name in part}
    return {name: sum(part[name] for part in parts if name in part) for name in names}
