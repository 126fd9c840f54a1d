"""Compares gradients with finite differences along random directions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.lab.compiled import compiled
from polygpt.lab.measured import EPSILON

STEPS = (2.0**-17, 2.0**-22)
"""Step sizes in float64, of which the better one counts: small enough to rarely contain a kink, large enough that
rounding hardly matters."""
SECANTS = (2.0**-6, 2.0**-8)
"""Step sizes over which discontinuous or rounded results have a slope that differs from their gradient."""
MARGIN, MOST = 32, 1e-2
"""Maximum error of a gradient as a multiple of the measured rounding, and in absolute terms."""


def errors(
    rng: np.random.Generator,
    leaves: Sequence[np.ndarray],
    gradients: Callable[[list], list],
    loss: Callable[[list, Any], jax.Array],
    steps: Sequence[float],
    smallest: float,
    argument: Any,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Errors of the gradient, relative to the typical slope along a direction, and their part from rounding.

    Args:
        rng: draws the directions.
        leaves: N float32 arrays, the point at which gradients are compared.
        gradients: the gradient of the loss for each leaf, in float32.
        loss: the loss, of float64 leaves and `argument`.
        steps: step sizes of the five-point formula.
        smallest: a slope that cannot be resolved.
        argument: the second argument of `loss`, a tree of arrays.

    Returns:
        The error [N] of each leaf's gradient, with the better of the step sizes; that from `SECANTS`; and the change of
        the gradient when the leaves are perturbed by an epsilon.
    """
    directions = [rng.normal(size=x.shape) * (np.std(x) or 1.0) for x in leaves]

    def measured(leaves):
        return [np.asarray(x, np.float64) for x in gradients(leaves)]

    expected = measured(leaves)
    nearby = measured([np.float32(x * (1 + EPSILON * rng.choice([-1, 1], x.shape))) for x in leaves])
    typical_N = np.array([np.linalg.norm(g * d) for g, d in zip(expected, directions, strict=True)])
    expected_N, nearby_N = (
        np.array([np.sum(g * d) for g, d in zip(found, directions, strict=True)]) for found in (expected, nearby)
    )

    def error_N(slope_SN):
        distance_SN = np.abs(slope_SN - expected_N) / (np.abs(slope_SN) + typical_N + smallest)
        return np.nan_to_num(np.min(distance_SN, axis=0), nan=np.inf)

    rounding = float(np.max(np.abs(nearby_N - expected_N) / (np.abs(expected_N) + typical_N + smallest)))
    offsets = [far * step for step in steps for far in (-2.0, -1.0, 1.0, 2.0)]
    offsets += [far * step for step in SECANTS for far in (-1.0, 1.0)]
    loss_NF = _along(loss, leaves, directions, offsets, argument)
    fine_NS4 = loss_NF[:, : 4 * len(steps)].reshape(len(leaves), -1, 4)
    wide_NS2 = loss_NF[:, 4 * len(steps) :].reshape(len(leaves), -1, 2)
    near_N = error_N((fine_NS4 @ np.array([1, -8, 8, -1])).T / (12 * np.array(steps)[:, None]))
    far_N = error_N((wide_NS2 @ np.array([-1, 1])).T / (2 * np.array(SECANTS)[:, None]))
    return near_N, far_N, rounding


def _along(loss: Callable, leaves: Sequence, directions: list, offsets: list[float], argument) -> np.ndarray:
    """The loss [N, F] at each offset along the direction of each leaf."""

    @compiled
    def measure(leaves, directions, offset_F, argument):
        def stepped(which, far):
            moved = [
                x + far * jnp.where(which == i, direction, 0)
                for i, (x, direction) in enumerate(zip(leaves, directions, strict=True))
            ]
            return loss(moved, argument)

        def of_leaf(which):
            return jax.lax.map(lambda far: stepped(which, far), offset_F, batch_size=4)

        return jax.lax.map(of_leaf, jnp.arange(len(leaves)))

    with jax.enable_x64(True):
        wide = [[np.asarray(x, np.float64) for x in arrays] for arrays in (leaves, directions)]
        return np.asarray(measure(*wide, np.array(offsets), argument))
