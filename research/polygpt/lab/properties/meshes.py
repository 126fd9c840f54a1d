"""A variant split over two devices, by heads or by positions, gives the same results as on one.

Where keys are gathered, positions are in zigzag order, unless the variant says that it needs the order of the row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from polygpt import sharding
from polygpt.attention import zigzag
from polygpt.lab import process
from polygpt.lab.compiled import compiled
from polygpt.lab.measured import Measured, absent, difference
from polygpt.lab.subject import Subject
from polygpt.spec import to_json

MESHES = {
    "tensor": sharding.MeshSpec(data=1, tensor=2),
    "sequence": sharding.MeshSpec(data=1, sequence=2),
    "sequence, in a ring": sharding.MeshSpec(data=1, sequence=2, context="ring"),
}
"""The meshes of two devices to check."""


def two_devices(subject: Subject) -> Measured:
    """Results and gradients on two CPU devices equal those on one, for each of `MESHES`."""
    if (reason := process.reason_against(type(subject.spec))) is not None:
        return absent(reason)
    length = subject.length + -subject.length % 4  # two devices divide it, each with two chunks
    asked = {"spec": to_json(subject.spec), "width": subject.width, "length": length}
    return process.worst(process.answer("polygpt.lab.two_devices", asked), subject.bound, "split by")


def off_by(subject: Subject, mesh: str) -> float:
    """The largest relative difference of results and gradients between two of this process's devices and one."""
    rows, form = subject.rows.packed, subject.form
    layout = sharding.make_layout(MESHES[mesh], jax.devices()[:2])

    def split(params, x_BTD, meta, cotangent_BTD):
        return form.pull_back(params, sharding.constrain(x_BTD, *sharding.RESIDUAL), meta, cotangent_BTD)

    arguments = subject.params, jnp.asarray(rows.x_BTD), rows.meta, subject.cotangent_BTD
    y_BTD, of_params, of_x_BTD = form.gradient(*arguments)
    if layout.spec.context == "gather" and layout.spec.sequence > 1 and not zigzag.needs_order(subject.spec):
        layout = dataclasses.replace(layout, zigzag=True)
        arguments = subject.params, *_in_zigzag(arguments[1:])
        y_BTD, of_x_BTD = _in_zigzag((y_BTD, of_x_BTD))
    with sharding.use_layout(layout):
        got = compiled(split)(*arguments)
    return max(map(difference, got, (y_BTD, of_params, of_x_BTD)))


def _in_zigzag(arrays: Any) -> Any:
    return jax.tree.map(lambda x: zigzag.reordered(jnp.asarray(x), 2), arrays)
