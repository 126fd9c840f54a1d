"""A variant split over two devices, by heads or by positions, gives the same results as on one."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from polygpt import sharding
from polygpt.lab.compiled import compiled
from polygpt.lab.measured import Measured, absent, difference
from polygpt.lab.subject import Subject
from polygpt.spec import class_name, to_json

MESHES = {
    "tensor": sharding.MeshSpec(data=1, tensor=2),
    "sequence": sharding.MeshSpec(data=1, sequence=2),
    "sequence, in a ring": sharding.MeshSpec(data=1, sequence=2, context="ring"),
}
"""The meshes of two devices to check."""
SECONDS = 240
"""Time limit of the second process."""


def two_devices(subject: Subject) -> Measured:
    """Results and gradients on two CPU devices equal those on one, for each of `MESHES`."""
    name = class_name(type(subject.spec))
    if "<locals>" in name or name.startswith("__main__:"):
        return absent("not run: a second process cannot import the class; write it to a file, outside of functions")
    length = subject.length + subject.length % 2  # two devices divide it
    asked = {"spec": to_json(subject.spec), "width": subject.width, "length": length}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "polygpt.lab.two_devices"]
    options = {"capture_output": True, "text": True, "env": environment, "timeout": SECONDS}
    try:
        done = subprocess.run(command, input=json.dumps(asked), **options)
    except subprocess.TimeoutExpired:
        return Measured(float("inf"), subject.bound, f"not done after {SECONDS} s: it hangs or is very slow")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Measured(float("inf"), subject.bound, f"its process ended with {done.returncode}: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    for mesh, result in found.items():
        if "raised" in result:
            return Measured(float("inf"), subject.bound, f"{mesh}: {result['raised']}")
    worst = max(found, key=lambda mesh: np.nan_to_num(found[mesh]["error"], nan=np.inf))
    error = found[worst]["error"]
    return Measured(error, subject.bound, "" if error <= subject.bound else f"split by {worst}")


def off_by(subject: Subject, mesh: str) -> float:
    """The largest relative difference of results and gradients between two of this process's devices and one."""
    rows, form = subject.rows.packed, subject.form
    layout = sharding.make_layout(MESHES[mesh], jax.devices()[:2])

    def split(params, x_BTD, meta, cotangent_BTD):
        return form.pull_back(params, sharding.constrain(x_BTD, *sharding.RESIDUAL), meta, cotangent_BTD)

    arguments = subject.params, jnp.asarray(rows.x_BTD), rows.meta, subject.cotangent_BTD
    with sharding.use_layout(layout):
        got = compiled(split)(*arguments)
    return max(map(difference, got, form.gradient(*arguments)))
