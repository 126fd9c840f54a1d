"""Gradients equal finite differences along random directions, with the program evaluated in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.lab import exact, finite
from polygpt.lab.finite import MARGIN, MOST, STEPS
from polygpt.lab.measured import EPSILON, Measured
from polygpt.lab.subject import Form, Subject

ROUGH_STEPS = (2.0**-6, 2.0**-7, 2.0**-9)
"""Step sizes if the program cannot be evaluated in float64. The model is then built in float64, but parts of it may
still compute in float32."""
JUMP = 0.1
"""Maximum error of such a slope, due to curvature within a step."""


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
    rough = 0.0

    def gradients(leaves):
        params, x_BTD = tree.unflatten([jnp.asarray(x, jnp.float32) for x in leaves])
        return jax.tree.leaves(form.gradient(params, x_BTD, rows.meta, weights_BTD)[1:])

    try:
        loss, steps = _in_float64(form, subject, tree, weights_BTD), STEPS
    except exact.Unsupported:
        loss, steps = _built_for_float64(subject, tree, weights_BTD), ROUGH_STEPS
        rough = 16 * EPSILON / steps[0]
    output = np.linalg.norm(weights_BTD) / 1e3  # slopes far below the scale of the loss cannot be resolved
    near_N, far_N, rounding = finite.errors(rng, leaves, gradients, loss, steps, output, rows.meta)
    bound = max(min(max(subject.bound, MARGIN * rounding), MOST), rough)
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
