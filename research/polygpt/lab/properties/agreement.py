"""Invariances: to the backend, to the rest of the row and the batch, and to JAX transformations."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.attention.kernels import dispatch
from polygpt.errors import SpecError
from polygpt.lab.compiled import compiled
from polygpt.lab.measured import Measured, absent, difference
from polygpt.lab.subject import Form, Subject
from polygpt.spec import from_json, hints, to_json

BLOCK = 8
"""Block size in which backends are compared."""


def backend(name: str, subject: Subject) -> Measured:
    """Result and all gradients equal the reference, with and without padding."""
    spec, fields = subject.spec, hints(type(subject.spec))
    if name not in spec.backends() or "backend" not in fields:
        return absent("it has its own implementation" if not spec.backends() else f"backends() does not name {name}")
    strict = {"strict": True} if "strict" in fields else {}
    form = subject.other(spec.replace(backend=name, **strict))
    errors = []
    try:
        for rows in (subject.rows.packed, subject.rows.masked):
            expected = _gradient(subject, subject.reference, rows)
            if np.isfinite(difference(expected, expected)):
                with dispatch.in_blocks_of(BLOCK):  # several blocks as in a long row, including empty and full ones
                    got = _gradient(subject, form, rows)
                errors += [difference(a, b) for a, b in zip(got, expected, strict=True)]
    except SpecError as refusal:
        if "strict is set" not in str(refusal):
            raise
        return absent(f"refused: {str(refusal).partition('cannot compute this: ')[2]}")
    return Measured(max(errors), subject.bound)


def examples_in_any_order(subject: Subject) -> Measured:
    """Packing examples in another order and in other rows does not change their results."""
    packed, permuted = subject.rows.packed, subject.rows.permuted
    error = difference(permuted.by_example(subject.y_BTD(permuted)), packed.by_example(subject.y_BTD(packed)))
    return Measured(error, subject.bound)


def padding_without_effect(subject: Subject) -> Measured:
    """The contents, number and place of padding positions do not change results."""
    ragged, compact = subject.rows.ragged, subject.rows.compact
    expected = compact.by_example(subject.y_BTD(compact))
    place, contents = (
        difference(rows.by_example(subject.y_BTD(rows)), expected) for rows in (ragged, ragged.with_garbage())
    )
    if not place <= subject.bound:  # even though padding is all zeros
        note = "where padding stands, or how much: is something counted by index instead of position, or across it?"
        return Measured(place, subject.bound, note)
    return Measured(contents, subject.bound, "" if contents <= subject.bound else "vectors at padding")


def rows_alone(subject: Subject) -> Measured:
    """A part of a batch gives the same results as the whole batch."""
    rows = subject.rows.packed
    alone = [subject.y_BTD(rows.row(b)) for b in range(len(rows.x_BTD))]
    return Measured(difference(np.concatenate(alone), subject.y_BTD(rows)), subject.bound)


def jit(subject: Subject) -> Measured:
    """Uncompiled execution equals compiled execution."""
    x_BTD, meta = jax.tree.map(jnp.asarray, (subject.rows.packed.x_BTD, subject.rows.packed.meta))
    return _same(subject, subject.form.apply(subject.params, x_BTD, meta))


def vmap(subject: Subject) -> Measured:
    """vmap over rows equals a batch of rows."""
    rows = jax.tree.map(lambda array: array[:, None], (subject.rows.packed.x_BTD, subject.rows.packed.meta))
    y_B1TD = compiled(jax.vmap(functools.partial(subject.form.apply, subject.params)))(*rows)
    return _same(subject, y_B1TD[:, 0])


def pmap(subject: Subject) -> Measured:
    """pmap over as many devices as divide the rows equals one device."""
    B, devices = len(subject.rows.packed.x_BTD), jax.local_devices()
    n = max(n for n in range(1, B + 1) if B % n == 0 and n <= len(devices))
    rows = (subject.rows.packed.x_BTD, subject.rows.packed.meta)
    split = jax.tree.map(lambda array: np.asarray(array).reshape(n, B // n, *array.shape[1:]), rows)
    y_nbTD = jax.pmap(functools.partial(subject.form.apply, subject.params), devices=devices[:n])(*split)
    same = _same(subject, np.reshape(y_nbTD, rows[0].shape))
    return dataclasses.replace(same, note=f"on {n} device{'s' * (n > 1)}")


def scan_and_remat(subject: Subject) -> Measured:
    """A scan with rematerialisation gives the same results and gradients."""
    layouts, form = (subject.rows.packed, subject.rows.permuted), subject.form

    @compiled
    def scanned(params, x_LBTD, meta):
        def together(params, x_LBTD):
            layer = jax.checkpoint(lambda _, columns: (None, form.apply(params, *columns)))
            return jax.lax.scan(layer, None, (x_LBTD, meta))[1]

        y_LBTD, back = jax.vjp(together, params, x_LBTD)
        return y_LBTD, *back(jnp.broadcast_to(subject.cotangent_BTD[None], y_LBTD.shape))

    x_LBTD, meta = jax.tree.map(lambda *arrays: np.stack(arrays), *((rows.x_BTD, rows.meta) for rows in layouts))
    y_LBTD, dparams, dx_LBTD = scanned(subject.params, x_LBTD, meta)
    (y, dp, dx), (y2, dp2, dx2) = (_gradient(subject, form, rows) for rows in layouts)
    expected = (np.stack([y, y2]), jax.tree.map(np.add, dp, dp2), np.stack([dx, dx2]))
    return Measured(max(map(difference, (y_LBTD, dparams, dx_LBTD), expected)), subject.bound)


def json_round_trip(subject: Subject) -> Measured:
    """The specification survives a JSON round trip and builds the same parameters."""
    read = from_json(json.loads(json.dumps(to_json(subject.spec))))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), form.abstract) for form in (subject.form, subject.other(read))]
    return Measured(float(read != subject.spec or shapes[0] != shapes[1]), 0.0)


def _gradient(subject: Subject, form: Form, rows):
    """(y_BTD without padding, gradient of the parameters, gradient of x_BTD)."""
    y_BTD, dparams, dx_BTD = form.gradient(subject.params, rows.x_BTD, rows.meta, subject.cotangent_BTD)
    return jnp.where(rows.padding_BT[..., None], 0, y_BTD), dparams, dx_BTD


def _same(subject, y_BTD) -> Measured:
    return Measured(difference(y_BTD, subject.y_BTD(subject.rows.packed)), subject.bound)
