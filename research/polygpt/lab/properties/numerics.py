"""Gradients and number formats: finite beside padding, right by finite differences, close in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.lab.compiled import compiled
from polygpt.lab.measured import EPSILON, Measured
from polygpt.lab.subject import Subject

STEPS = (2.0**-6, 2.0**-7, 2.0**-9)
"""The steps of finite differences, of which the best counts. With the largest rounding hardly matters, as some parts of
a variant compute in float32 whatever is asked; with the smallest it does not matter how sharply results bend: the error
of the formula goes with the fourth power of the step."""


def finite_gradients(subject: Subject) -> Measured:
    """Results and all gradients are finite where whole rows are padding: the number that are not."""
    rows = subject.rows.masked.with_garbage()
    found = subject.form.gradient(subject.params, rows.x_BTD, rows.meta, subject.cotangent_BTD)
    wrong = sum(int((~np.isfinite(np.asarray(x, np.float32))).sum()) for x in jax.tree.leaves(found))
    return Measured(float(wrong), 0.0, "numbers that are NaN or infinite" if wrong else "")


def finite_differences(subject: Subject) -> Measured:
    """Along a random direction for the input and for each parameter, gradients are the slope of the loss, in float64.

    The slope is taken by the five-point formula. An error is relative to what a direction's slope typically is.
    """
    with jax.enable_x64(True):
        form = subject.other(subject.differentiable.spec, "float64")
        rows, rng = subject.rows.packed, np.random.default_rng(2)
        point = jax.tree.map(lambda x: np.asarray(x, np.float64), (subject.params, rows.x_BTD))
        weights_BTD = rng.normal(size=rows.x_BTD.shape)
        leaves, tree = jax.tree.flatten(point)
        directions = [rng.normal(size=x.shape) * (np.std(x) or 1.0) for x in leaves]

        @compiled
        def measure(leaves, directions, meta):
            def loss(leaves):
                return jnp.sum(weights_BTD * form.apply(*tree.unflatten(leaves), meta))

            def stepped(which, far):
                moved = [
                    x + far * jnp.where(which == i, direction, 0)
                    for i, (x, direction) in enumerate(zip(leaves, directions, strict=True))
                ]
                return loss(moved)

            far_S4 = jnp.array(STEPS)[:, None] * jnp.array([-2.0, -1.0, 1.0, 2.0])[None]
            along = jax.vmap(jax.vmap(jax.vmap(stepped, (None, 0)), (None, 0)), (0, None))
            return along(jnp.arange(len(leaves)), far_S4), jax.grad(loss)(leaves)

        loss_NS4, gradients = jax.tree.map(np.asarray, measure(leaves, directions, rows.meta))
    slope_SN = (loss_NS4 @ np.array([1, -8, 8, -1])).T / (12 * np.array(STEPS)[:, None])
    expected_N = np.array([np.sum(g * d) for g, d in zip(gradients, directions, strict=True)])
    typical_N = np.array([np.linalg.norm(g * d) for g, d in zip(gradients, directions, strict=True)])
    output = np.linalg.norm(weights_BTD) / 1e3  # nothing can be said of slopes far below what the loss is made of
    error_N = np.min(np.abs(slope_SN - expected_N) / (np.abs(slope_SN) + typical_N + output), axis=0)
    worst = int(np.argmax(error_N))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(point)[0]]
    bound = 16 * EPSILON / STEPS[0]
    return Measured(float(error_N[worst]), bound, "" if error_N[worst] <= bound else f"worst: {paths[worst]}")


def bfloat16(subject: Subject) -> Measured:
    """Computed in bfloat16, with a cache and without, near the float32 result, and given back in bfloat16."""
    rows, form = subject.rows.packed, subject.other(subject.spec, "bfloat16")
    x_BTD = rows.x_BTD.astype(jnp.bfloat16)
    y_BTD = form.forward(subject.params, x_BTD, rows.meta)
    cache = subject.spec.init_cache(form.dims, *rows.meta.index.shape, True)
    cached = form.through_cache(subject.params, x_BTD, rows.meta, cache)
    for name, dtype in {"the result": y_BTD.dtype, "the result over a cache": cached.dtype}.items():
        if dtype != jnp.bfloat16:
            return Measured(float("inf"), 0.0, f"{name} is {dtype}")
    expected_BTD = subject.y_BTD(rows)
    errors = [np.linalg.norm(np.float32(y) - expected_BTD) / np.linalg.norm(expected_BTD) for y in (y_BTD, cached)]
    return Measured(float(max(errors)), 8 * float(jnp.finfo(jnp.bfloat16).eps))
