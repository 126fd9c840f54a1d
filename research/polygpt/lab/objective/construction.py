"""The basis of all other properties: total, weight and view have the forms that the contract asks for."""

import jax
import numpy as np

from polygpt.lab.measured import Measured
from polygpt.lab.objective.subject import Subject
from polygpt.objectives.base import BatchObjective
from polygpt.sequence import Batch


def builds_and_runs(subject: Subject) -> Measured:
    """Total and weight are finite float32 scalars, and the view is a batch of the same shape that obeys the layout."""
    fault = _of_view(subject) or _of_pair(subject)
    if not fault and not (np.isfinite(subject.usual.total) and np.isfinite(subject.usual.weight)):
        fault = f"the total is {subject.usual.total} and the weight {subject.usual.weight}: both must be finite"
    if not fault and subject.usual.weight < 0:
        fault = f"the weight is {subject.usual.weight}: it must not be negative"
    return Measured(float(bool(fault)), 0.0, fault)


def _of_view(subject: Subject) -> str:
    """The fault of the view; "" if there is none."""
    if subject.objective.view is None:
        return ""
    seen = jax.eval_shape(subject.loss().seen, subject.batch, jax.random.key(0))[0]
    if not isinstance(seen, Batch) or jax.tree.structure(seen) != jax.tree.structure(subject.batch):
        return f"the view returns {type(seen).__name__}: it must return a Batch with the arrays of the one that it gets"
    return subject.fault_of_view()


def _of_pair(subject: Subject) -> str:
    """The fault in the forms of total and weight."""
    found = jax.eval_shape(subject.pair, subject.params, subject.others, subject.seen)
    for name, value in zip(("total", "weight"), found, strict=True):
        form = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        if form != "float32[]":
            return f"the {name} is {form}, but must be a scalar, float32[]"
    if isinstance(subject.objective, BatchObjective):
        embedded = jax.eval_shape(
            lambda params, others, batch: subject.objective.embed(subject.forward(params, others, batch), batch),
            *(subject.params, subject.others, subject.seen),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(embedded):
            if leaf.dtype != "float32" or leaf.shape[:1] != subject.seen.shape[:1]:
                name = f"embed{jax.tree_util.keystr(path)}"
                return f"{name} is {leaf.dtype}{list(leaf.shape)}, but must be float32, with the rows as its first axis"
    return ""
