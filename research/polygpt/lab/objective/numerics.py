"""Numerics: finite with any media and any prediction, accurate in bfloat16, and the right gradient."""

import jax.numpy as jnp
import numpy as np

from polygpt.lab import exact, finite
from polygpt.lab.finite import MARGIN, MOST, STEPS
from polygpt.lab.measured import Measured, absent
from polygpt.lab.objective import rows
from polygpt.lab.objective.subject import Subject
from polygpt.lab.objective.weights import leaves
from polygpt.models.functional import bind
from polygpt.parameters import paths, tree_of
from polygpt.sequence import TEXT, Media

BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)
CERTAIN = 300.0
"""Factor on the head: with it, the probability of nearly every token is 0 in float32."""
HEAD = "head/kernel"


def without_media(subject: Subject) -> Measured:
    """Rows of text alone give a finite loss and gradient."""
    batch = subject.batch
    segment_BT = np.asarray(batch.segment_BT)
    of_media_BT = np.asarray(batch.modality_BT) > TEXT
    order = []
    for b in range(len(segment_BT)):
        segments = [s for s in np.unique(segment_BT[b]) if s and not of_media_BT[b, segment_BT[b] == s].any()]
        order.append((b, segments if subject.needs.together == 1 else []))
    texts = rows.taken(batch, order, subject.model.positions)
    empty = {name: Media(one.features, np.zeros_like(one.length_BN)) for name, one in texts.media.items()}
    return _finite(subject.result(subject.viewed(texts.replace(media=empty))))


def certain(subject: Subject) -> Measured:
    """Predictions that are certain, and certainly wrong, give a finite loss and gradient."""
    named = paths(subject.params)
    params = tree_of({**named, HEAD: CERTAIN * named[HEAD]})
    return _finite(subject.result(subject.seen, params))


def bfloat16(subject: Subject) -> Measured:
    """A model that computes in bfloat16 gives nearly the loss of one in float32, summed in float32."""
    low = bind(subject.model.spec.replace(dtype="bfloat16"), subject.model.vocabulary)
    found, usual = subject.measure(low, subject.seen), subject.usual
    scale = abs(float(usual.total)) + abs(float(usual.weight)) / 100
    error = abs(float(found.total) - float(usual.total)) / scale
    weight = abs(float(found.weight) - float(usual.weight))
    return Measured(error + weight, 8 * BFLOAT16)


def finite_differences(subject: Subject) -> Measured:
    """Along a random direction for each parameter, the gradient equals the slope of the total, in float64.

    The bound is what rounding explains: see `finite.errors`.
    """
    fixed, moved = {}, {}
    for name, x in paths(subject.params).items():
        floating = x.dtype.kind == "f" and paths(subject.model.traits)[name].trained
        (moved if floating else fixed)[name] = x

    def params(leaves):
        return tree_of(dict(zip(moved, leaves, strict=True)) | fixed)

    def gradients(leaves):
        found = paths(subject.result(subject.seen, params(leaves)).gradient)
        return [found[name] for name in moved]

    def total(leaves, given):
        return subject.pair(params(leaves), *given)[0]

    given = subject.others, subject.seen
    try:
        wide = exact.widened(total, list(moved.values()), given)
    except exact.Unsupported as operation:
        return absent(f"{operation} cannot be evaluated in float64")
    smallest = (abs(float(subject.usual.total)) + abs(float(subject.usual.weight))) / 1e3
    rng, leaves = np.random.default_rng(2), list(moved.values())
    near_N, _, rounding = finite.errors(rng, leaves, gradients, wide, STEPS, smallest, given)
    bound, worst = min(max(subject.bound, MARGIN * rounding), MOST), int(np.argmax(near_N))
    note = "" if near_N[worst] <= bound else f"worst: {list(moved)[worst]}; is a gradient stopped, or of your own?"
    return Measured(float(near_N[worst]), bound, note)


def _finite(found) -> Measured:
    count = sum(int((~np.isfinite(x)).sum()) for x in leaves(found))
    return Measured(float(count), 0.0, "numbers that are NaN or infinite" if count else "")
