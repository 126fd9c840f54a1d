"""Numerics: finite values next to padding, and accuracy in bfloat16, also over long rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.lab.layout import Example, lay_out
from polygpt.lab.measured import Measured, difference, rounding
from polygpt.lab.subject import Subject

BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps)
OTHERWISE = 0.2
"""Fraction of positions that may choose differently in bfloat16 if results are discontinuous."""
LONG = 512
"""Length of a row that is long enough for sums in bfloat16 to stall: from 256 on, adding 1 has no effect."""
BEGINNING, END = slice(8, 72), slice(-64, None)
"""The positions compared."""
GROWTH = 4.0
"""Maximum ratio of the error at the end of a long row to that at its beginning."""


def finite_gradients(subject: Subject) -> Measured:
    """Results and all gradients are finite even if whole rows are padding; the error is the number of other values.

    Vectors at padding are zero, as in a model, or large.
    """
    zeros = subject.rows.masked
    wrong = {
        contents: sum(int((~np.isfinite(np.asarray(x, np.float32))).sum()) for x in jax.tree.leaves(found))
        for contents, rows in {"zero": zeros, "large": zeros.with_garbage()}.items()
        for found in [subject.form.gradient(subject.params, rows.x_BTD, rows.meta, subject.cotangent_BTD)]
    }
    contents = " or ".join(contents for contents, count in wrong.items() if count)
    note = f"numbers that are NaN or infinite where vectors at padding are {contents}" if contents else ""
    return Measured(float(max(wrong.values())), 0.0, note)


def bfloat16(subject: Subject) -> Measured:
    """In bfloat16, with and without a cache, results are close to float32 and have dtype bfloat16."""
    rows, form = subject.rows.packed, subject.other(subject.spec, "bfloat16")
    x_BTD = rows.x_BTD.astype(jnp.bfloat16)
    y_BTD = form.forward(subject.params, x_BTD, rows.meta)
    cached = subject.cached_BTD(rows, ring=True, form=form)
    for name, dtype in {"the result": y_BTD.dtype, "the result over a cache": cached.dtype}.items():
        if dtype != jnp.bfloat16:
            return Measured(float("inf"), 0.0, f"{name} is {dtype}")
    expected_BTD = subject.y_BTD(rows)
    width, expected_ND = subject.width, expected_BTD.reshape(-1, subject.width)
    errors = [
        _share(np.float32(y).reshape(-1, width) - expected_ND, expected_ND, subject.spec.jumps) for y in (y_BTD, cached)
    ]
    return Measured(max(errors), 8 * BFLOAT16)


def long_rows(subject: Subject) -> Measured:
    """The start of a 512-position row equals a shorter row, and bfloat16 errors do not grow towards its end."""
    example = Example(30, LONG, ((0, 8, 1, True), (300, 320, 2, False)))
    labels = subject.spec.labels()
    row = lay_out([[example]], LONG, subject.width, labels)
    short = lay_out([[example.part(0, LONG // 4)]], LONG // 4, subject.width, labels)
    y_TD, begin_TD = subject.y_BTD(row)[0], subject.y_BTD(short)[0]
    error, bound = difference(y_TD[: LONG // 4], begin_TD), rounding(LONG, subject.width)
    if not error <= bound:
        return Measured(error, bound, f"the first {LONG // 4} of {LONG} positions differ from a row of their own")
    low = subject.other(subject.spec, "bfloat16")
    off_TD = np.float32(subject.y_BTD(dataclasses.replace(row, x_BTD=row.x_BTD.astype(jnp.bfloat16)), low)[0]) - y_TD
    begin, end = (_share(off_TD[part], y_TD[part], subject.spec.jumps) for part in (BEGINNING, END))
    bound = min(8 * BFLOAT16, max(GROWTH * begin, BFLOAT16))
    note = "" if end <= bound else f"in bfloat16, at the end; {begin:.1e} at the beginning: sum in float32"
    return Measured(end, bound, note)


def _share(off_TD: np.ndarray, y_TD: np.ndarray, jumps: bool) -> float:
    """The relative norm of a difference; for discontinuous results, without the worst positions."""
    off_T = np.linalg.norm(off_TD, axis=-1)
    if jumps:
        off_T = np.sort(off_T)[: max(1, int(len(off_T) * (1 - OTHERWISE)))]
    return float(np.linalg.norm(off_T) / (np.linalg.norm(y_TD) + np.finfo(np.float32).tiny))
