"""Further properties with other fields, in another model, and in rows longer than a block or a table."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from polygpt.attention.biases import ALiBi
from polygpt.attention.contract import Context
from polygpt.attention.kernels.reference import weighted_values
from polygpt.attention.masks import DECODER
from polygpt.attention.multi_head import MultiHeadModule
from polygpt.errors import SpecError
from polygpt.lab.compiled import compiled
from polygpt.lab.measured import Measured, absent, difference
from polygpt.lab.properties import agreement, memory, visibility
from polygpt.lab.subject import Subject, embedded
from polygpt.spec import hints

EARLY, LATE = 44, 120
"""Positions before which a gap is inserted, to check that positions are distinguished there."""
Property = Callable[[Subject], Measured]


def in_long_rows(measure: Property, subject: Subject) -> Measured:
    """Another property, measured in rows of at least 160 positions."""
    return measure(subject.long)


def grouped_heads(subject: Subject) -> Measured:
    """Caches, backends and weights agree with one and with two key and value heads."""
    spec = subject.spec
    if "kv_heads" not in hints(type(spec)):
        return absent("it has no field kv_heads")
    others = [n for n in (2, 1) if n != (spec.kv_heads or spec.heads) and spec.heads % n == 0]
    chunked = functools.partial(agreement.backend, "chunked")
    measures = {
        "full cache": memory.full_cache,
        "ring cache": memory.ring_cache,
        "chunked": chunked,
        "weights": weights_of_output,
    }
    variations = {f"kv_heads {n}": {"kv_heads": n} for n in others}
    return _worst(subject, variations, measures)


def second_position(subject: Subject) -> Measured:
    """Properties hold in a model with ALiBi, a score modification with terms, instead of Rope."""
    if getattr(subject.spec, "position", None) is not None:
        return absent("its own position is set, so that of the model has no effect")
    measures = {
        "full cache": memory.full_cache,
        "ring cache": memory.ring_cache,
        "ragged decoding": memory.ragged_decoding,
        "padding": agreement.padding_without_effect,
        "mask": visibility.mask_honoured,
        "chunked": functools.partial(agreement.backend, "chunked"),
    }
    return _worst(subject, {"ALiBi": {"position": ALiBi()}}, measures)


def positions_told_apart(subject: Subject) -> Measured:
    """If a gap between two early positions changes results, so does a gap between late ones.

    Otherwise a table ends or an index is clamped in between.
    """
    subject = subject.long
    rows = subject.rows.packed
    y_BTD = subject.y_BTD(rows)

    def change(gap: int) -> float:
        position_BT = rows.meta.position + (rows.meta.position >= gap)
        moved = dataclasses.replace(rows, meta=dataclasses.replace(rows.meta, position=np.int32(position_BT)))
        return difference(subject.y_BTD(moved), y_BTD)

    early, late = change(EARLY), change(LATE)
    lost = early > subject.bound and not late > subject.bound
    return Measured(
        float(lost),
        0.0,
        f"a gap before position {EARLY} changes results, but one before {LATE} does not" if lost else "",
    )


def weights_of_output(subject: Subject) -> Measured:
    """`weights()` times values equals the backend's output; weights of chosen queries are a subset of all weights."""
    rows, form = subject.rows.packed, subject.form
    module = nnx.eval_shape(form.build)
    if not isinstance(module, MultiHeadModule) or getattr(module, "weights", None) is None:
        return absent("it has no weights, or its own implementation")
    chosen, mapped = np.array([subject.length - 3, 1, 7], np.int32), []

    @compiled
    def measure(params, x_BTD, meta, chosen):
        context = Context(meta, meta, DECODER, inputs_BTD=embedded(x_BTD))
        module = nnx.merge(form.graphdef, params)
        weights_BHTS = module.weights(x_BTD, context)
        attend, faults = module.attend, []

        def by_weights(rule, operands):
            y_BHTe, lse_BHT = attend(rule, operands)
            if weights_BHTS.shape != (*y_BHTe.shape[:3], operands.key_BKSd.shape[2]):
                faults.append(f"weights() returns {weights_BHTS.shape} for results of {y_BHTe.shape}")
                return y_BHTe, lse_BHT
            if operands.value_BKSe.shape[3] != y_BHTe.shape[3]:
                mapped.append(True)
                return y_BHTe, lse_BHT
            return weighted_values(weights_BHTS, operands.value_BKSe).astype(y_BHTe.dtype), lse_BHT

        module.attend = by_weights
        y_BTD = module(x_BTD, context)[0]
        if faults:
            raise SpecError(faults[0])
        some_BHRS = module.weights(x_BTD, context, chosen)
        return y_BTD, weights_BHTS[:, :, chosen], some_BHRS

    y_BTD, expected, some = measure(subject.params, rows.x_BTD, rows.meta, chosen)
    if mapped:
        return absent("attend() makes its values of those that are remembered")
    error, of_some = difference(y_BTD, subject.y_BTD(rows)), difference(some, expected)
    note = "" if error <= subject.bound else "weigh() does not return the weights that attend() uses"
    if not note and not of_some <= subject.bound:
        note = "the weights of chosen queries differ from those of all queries"
    return Measured(max(error, of_some), subject.bound, note)


def parameters_learn(subject: Subject) -> Measured:
    """No parameter has a gradient of exactly zero; the error is the number of those that have."""
    rows, form = subject.rows.packed, subject.differentiable
    _, dparams, _ = form.gradient(subject.params, rows.x_BTD, rows.meta, subject.cotangent_BTD)
    learned = nnx.filter_state(dparams, nnx.Param) if isinstance(dparams, nnx.State) else dparams
    dead = [
        jax.tree_util.keystr(path).removesuffix(".value")
        for path, leaf in jax.tree_util.tree_leaves_with_path(learned)
        if leaf.size and not np.any(np.asarray(leaf))
    ]
    return Measured(float(len(dead)), 0.0, f"without any gradient: {', '.join(dead)}" if dead else "")


def _worst(subject: Subject, variations: dict[str, dict], measures: dict[str, Property]) -> Measured:
    """The worst property relative to its bound, over all variations that the variant allows."""
    worst, refused = None, "it has only one head"
    for name, fields in variations.items():
        try:
            changed = subject.changed(**fields)
        except SpecError as refusal:
            refused = f"refused: {refusal}"
            continue
        for about, measure in measures.items():
            found = measure(changed)
            if found.holds is None:
                continue
            excess = found.error / found.bound if found.bound else float(not found.holds)
            note = " ".join(filter(None, [f"{name}, {about}" + (":" if found.note else ""), found.note]))
            if worst is None or not excess <= worst[0]:
                worst = excess, dataclasses.replace(found, note="" if found.holds else note)
                if not found.holds:
                    return worst[1]
    return absent(refused) if worst is None else worst[1]
