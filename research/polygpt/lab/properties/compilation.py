"""The variant compiles for a TPU, even if none is present."""

import jax
import jax.numpy as jnp

from polygpt import topology
from polygpt.attention.kernels import dispatch
from polygpt.attention.meta import Meta
from polygpt.errors import UserError
from polygpt.lab.measured import Measured, absent
from polygpt.lab.subject import Subject

SLICE = "v5e:1x1"
SHAPE = (1, 512)
"""Rows and positions: enough that the automatic choice of a backend avoids the materialised matrix."""


def tpu(subject: Subject) -> Measured:
    """Forward and backward compile for a v5e, in bfloat16, with a common head width."""
    try:
        topology.devices(SLICE)
    except UserError as missing:
        return absent(f"not run: {missing}")
    form = subject.other(subject.spec, "bfloat16", scale=16)
    x_BTD = jax.ShapeDtypeStruct((*SHAPE, form.dims.width), jnp.bfloat16)
    meta = jax.eval_shape(lambda: Meta.empty(*SHAPE, subject.spec.labels()))
    with dispatch.compiling_for("tpu"):
        program = topology.compile_for(SLICE, form.pull_back, form.abstract, x_BTD, meta, x_BTD)
    kernels = program.as_text().count("tpu_custom_call")
    lost = "flex" in subject.spec.backends() and not kernels
    note = "no fused kernel, though backends() names flex" if lost else f"{kernels} fused kernels" if kernels else ""
    return Measured(float(lost), 0.0, note)
