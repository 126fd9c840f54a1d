"""Properties of the loss weights: they decide what counts, in the total as in the divisor."""

import jax
import numpy as np

from polygpt.lab.measured import Measured, absent
from polygpt.lab.objective.subject import Subject, off_by

UNREAD = "it does not read the loss weights"


def without_weight(subject: Subject) -> Measured:
    """Targets and labels of positions whose loss weight is 0 reach neither the total, the weight nor the gradient."""
    if not subject.reads_weights and subject.needs.rows is not None:
        return absent(f"{UNREAD}, but arrays of its own")
    seen = subject.seen
    unused_BT = np.asarray(seen.weight_BT) == 0
    other_BT = (seen.target_BT + 1 + np.arange(seen.target_BT.size).reshape(seen.target_BT.shape) % 97) % 256
    changed = seen.replace(target_BT=np.where(unused_BT, other_BT, seen.target_BT).astype(seen.target_BT.dtype))
    error = subject.result(changed).off_by(subject.usual)
    note = "" if error <= subject.bound else "other targets at positions of weight 0 change it: multiply by weight_BT"
    return Measured(error, subject.bound, note)


def doubled(subject: Subject) -> Measured:
    """Twice the weights give the same mean loss and gradient."""
    seen = subject.seen
    twice = subject.result(seen.replace(weight_BT=2 * seen.weight_BT))
    error = off_by(twice.mean, subject.usual.mean)
    note = "" if error <= subject.bound else "total and weight do not grow alike: total is a sum, weight its divisor"
    return Measured(error, subject.bound, note)


def linear(subject: Subject) -> Measured:
    """Total and weight are linear in the weights: those of two parts of the positions add up."""
    seen, usual = subject.seen, subject.usual
    first_BT = np.random.default_rng(3).random(seen.weight_BT.shape) < 0.15
    parts = [
        subject.result(seen.replace(weight_BT=np.where(part_BT, seen.weight_BT, 0).astype(np.float32)))
        for part_BT in (first_BT, ~first_BT)
    ]
    if not subject.reads_weights:
        return absent(UNREAD)
    error = subject.summed(*parts, subject.weightless).off_by(usual)
    note = (
        ""
        if error <= subject.bound
        else "total, weight or gradient of two parts of the positions are not those of both"
    )
    return Measured(error, subject.bound, note)


def nothing(subject: Subject) -> Measured:
    """Without any weight, the loss is 0 and its gradient finite."""
    found = subject.weightless
    finite = all(np.isfinite(x).all() for x in leaves(found))
    return Measured(float(not finite), 0.0, "" if finite else "NaN or infinite: a division by the sum of the weights?")


def leaves(found) -> list[np.ndarray]:
    """All arrays of a result."""
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(found)]
