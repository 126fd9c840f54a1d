"""The basis of all other properties: the variant can be built and called, and keeps the contract's shapes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from polygpt.attention.contract import Context
from polygpt.attention.masks import DECODER
from polygpt.lab.measured import Measured
from polygpt.lab.subject import Subject


def builds_and_runs(subject: Subject) -> Measured:
    """A call on rows [B, T, D] returns (y_BTD, cache), y in the model's dtype and a cache of unchanged structure."""
    rows, form = subject.rows.packed, subject.form

    def called(cache: Any, cursor: jax.Array | None) -> Any:
        def call(params, x_BTD, meta, cache, cursor):
            context = Context(meta, meta, DECODER, cursor, inputs_BTD=x_BTD)
            return nnx.merge(form.graphdef, params)(x_BTD, context, cache)

        return jax.eval_shape(call, subject.params, rows.x_BTD, rows.meta, cache, cursor)

    fault = _of_result(called(None, None), rows.x_BTD)
    for ring in (False, True):
        if not fault:
            cache = jax.eval_shape(lambda ring=ring: subject.spec.init_cache(form.dims, *rows.x_BTD.shape[:2], ring))
            result = called(cache, jnp.zeros((), jnp.int32))
            fault = _of_result(result, rows.x_BTD) or _of_cache(result[1], cache)
            fault = fault and f"with a cache, {fault}"
    return Measured(float(bool(fault)), 0.0, fault)


def _of_result(result: Any, x_BTD: Any) -> str:
    """The fault in the result of a call; empty if there is none."""
    if not (isinstance(result, tuple) and len(result) == 2):
        return f"a call returns {_form(result)}: it must return a pair, (y_BTD, cache)"
    got, due = _form(result[0]), _form(x_BTD)
    if got == due:
        return ""
    if getattr(result[0], "shape", None) != x_BTD.shape:
        got, due = (form.removeprefix(f"{x_BTD.dtype}") for form in (got, due))
    return f"the result is {got}, but must be {due}"


def _of_cache(given_back: Any, cache: Any) -> str:
    """The fault in the cache that a call returns."""
    if jax.tree.structure(given_back) != jax.tree.structure(cache):
        return "the second result does not have the structure of init_cache()"
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(given_back), jax.tree.leaves(cache), strict=True):
        if _form(new) != _form(old):
            return f"the second result has {_form(new)} at {jax.tree_util.keystr(path)}, init_cache() {_form(old)}"
    return ""


def _form(value: Any) -> str:
    """An array as "float32[3, 24, 32]", anything else as its type."""
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
