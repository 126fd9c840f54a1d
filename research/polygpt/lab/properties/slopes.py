"""Gradients equal finite differences along random directions, with the program evaluated in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.lab import exact
from polygpt.lab.compiled import compiled
from polygpt.lab.measured import EPSILON, Measured
from polygpt.lab.subject import Form, Subject

STEPS = (2.0**-17, 2.0**-22)
"""Step sizes in float64, of which the better one counts: small enough to rarely contain a kink, large enough that
rounding hardly matters."""
ROUGH_STEPS = (2.0**-6, 2.0**-7, 2.0**-9)
"""Step sizes if the program cannot be evaluated in float64. The model is then built in float64, but parts of it may
still compute in float32."""
SECANTS = (2.0**-6, 2.0**-8)
"""Step sizes over which discontinuous or rounded results have a slope that differs from their gradient."""
JUMP = 0.1
"""Maximum error of such a slope, due to curvature within a step."""
MARGIN, MOST = 32, 1e-2
"""Maximum error of a gradient as a multiple of the measured rounding, and in absolute terms."""


def finite_differences(subject: Subject) -> Measured:
    """Along a random direction for the input and each parameter, the gradient equals the slope of the loss.

    The slope is computed by the five-point formula from the model's own program evaluated in float64. Errors are
    relative to the typical slope of a direction. The bound is what rounding explains: that of a layer, or a multiple of
    the change of the gradient when the parameters are perturbed by an epsilon.
    """
    form, rows = subject.differentiable, subject.rows.packed
    rng = np.random.default_rng(2)
    weights_BTD = rng.normal(size=rows.x_BTD.shape).astype(np.float32)
    leaves, tree = jax.tree.flatten((subject.params, rows.x_BTD))
    leaves = [np.asarray(x, np.float32) for x in leaves]
    directions = [rng.normal(size=x.shape) * (np.std(x) or 1.0) for x in leaves]

    def gradients(leaves):
        params, x_BTD = tree.unflatten([jnp.asarray(x, jnp.float32) for x in leaves])
        _, *found = form.gradient(params, x_BTD, rows.meta, weights_BTD)
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]

    expected = gradients(leaves)
    nearby = gradients([np.float32(x * (1 + EPSILON * rng.choice([-1, 1], x.shape))) for x in leaves])
    typical_N = np.array([np.linalg.norm(g * d) for g, d in zip(expected, directions, strict=True)])
    expected_N, nearby_N = (
        np.array([np.sum(g * d) for g, d in zip(found, directions, strict=True)]) for found in (expected, nearby)
    )
    output = np.linalg.norm(weights_BTD) / 1e3  # slopes far below the scale of the loss cannot be resolved

    def error_N(slope_SN):
        distance_SN = np.abs(slope_SN - expected_N) / (np.abs(slope_SN) + typical_N + output)
        return np.nan_to_num(np.min(distance_SN, axis=0), nan=np.inf)

    rounding = float(np.max(np.abs(nearby_N - expected_N) / (np.abs(expected_N) + typical_N + output)))
    bound = min(max(subject.bound, MARGIN * rounding), MOST)
    try:
        loss, steps = _in_float64(form, subject, tree, weights_BTD), STEPS
    except exact.Unsupported:
        loss, steps = _built_for_float64(subject, tree, weights_BTD), ROUGH_STEPS
        bound = max(bound, 16 * EPSILON / steps[0])
    offsets = [far * step for step in steps for far in (-2.0, -1.0, 1.0, 2.0)]
    offsets += [far * step for step in SECANTS for far in (-1.0, 1.0)]
    loss_NF = _along(loss, leaves, directions, offsets, rows.meta)
    fine_NS4 = loss_NF[:, : 4 * len(steps)].reshape(len(leaves), -1, 4)
    wide_NS2 = loss_NF[:, 4 * len(steps) :].reshape(len(leaves), -1, 2)
    near_N = error_N((fine_NS4 @ np.array([1, -8, 8, -1])).T / (12 * np.array(steps)[:, None]))
    far_N = error_N((wide_NS2 @ np.array([-1, 1])).T / (2 * np.array(SECANTS)[:, None]))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree.unflatten(leaves))[0]]
    worst, jumping = int(np.argmax(near_N)), int(np.argmax(far_N))
    if near_N[worst] <= bound and far_N[jumping] > JUMP and not subject.spec.jumps:
        note = f"results jump, or are rounded, along {paths[jumping]}: if a discrete choice is intended, set jumps"
        return Measured(float(far_N[jumping]), JUMP, note)
    return Measured(float(near_N[worst]), bound, "" if near_N[worst] <= bound else f"worst: {paths[worst]}")


def _in_float64(form: Form, subject: Subject, tree, weights_BTD) -> Callable:
    """The loss as a function of leaves, from the model's program with all numbers in float64."""
    rows = subject.rows.packed
    apply = exact.widened(form.apply, subject.params, rows.x_BTD, rows.meta)
    return lambda leaves, meta: jnp.sum(weights_BTD * apply(*tree.unflatten(leaves), meta))


def _built_for_float64(subject: Subject, tree, weights_BTD) -> Callable:
    """The loss as a function of leaves, from a model built with float64 as compute dtype."""
    form = subject.other(subject.differentiable.spec, "float64")
    return lambda leaves, meta: jnp.sum(weights_BTD * form.apply(*tree.unflatten(leaves), meta))


def _along(loss: Callable, leaves: list, directions: list, offsets: list[float], meta) -> np.ndarray:
    """The loss [N, F] at each offset along the direction of each leaf."""

    @compiled
    def measure(leaves, directions, offset_F, meta):
        def stepped(which, far):
            moved = [
                x + far * jnp.where(which == i, direction, 0)
                for i, (x, direction) in enumerate(zip(leaves, directions, strict=True))
            ]
            return loss(moved, meta)

        def of_leaf(which):
            return jax.lax.map(lambda far: stepped(which, far), offset_F, batch_size=4)

        return jax.lax.map(of_leaf, jnp.arange(len(leaves)))

    with jax.enable_x64(True):
        wide = [[np.asarray(x, np.float64) for x in arrays] for arrays in (leaves, directions)]
        return np.asarray(measure(*wide, np.array(offsets), meta))
