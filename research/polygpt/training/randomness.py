"""Random keys are derived from the seed, the step and their purpose; never stored."""

import jax

INIT = 0
"""Purpose: initial parameters."""
DROPOUT = 1
"""Purpose: dropout in training."""
VIEW = 2
"""Purpose: views, the batches that objectives derive from the batch of the data."""


def derive(seed: int, step, purpose: int) -> jax.Array:
    """The key for one purpose at one step; `step` may be traced."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)
