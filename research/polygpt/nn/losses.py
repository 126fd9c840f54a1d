"""Auxiliary losses of layers, such as those of routers."""

import jax

Losses = dict[str, jax.Array]
"""float32 scalars by name. Each is a sum over real positions, so that blocks, microbatches and devices add up."""


def add(*parts: Losses) -> Losses:
    """Sums by name; a missing name counts as 0."""
    names = {name: None for part in parts for name in part}
    return {name: sum(part[name] for part in parts if name in part) for name in names}
