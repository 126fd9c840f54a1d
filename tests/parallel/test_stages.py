"""Stages on several devices: the numbers of one device, and only activations go from stage to stage."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from batches import build, example, tiny
from many_devices import VARIABLES
from polygpt import sharding, topology
from polygpt.attention.kernels import dispatch
from polygpt.attention.multi_head import MultiHead
from polygpt.models.functional import bind
from polygpt.sharding import MeshSpec


def run_on(mesh):
    script = Path(__file__).with_name("stages_on_eight_devices.py")
    environment = os.environ | VARIABLES
    done = subprocess.run([sys.executable, script, mesh], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loss_off"] < 1e-5 and found["off"] < 1e-5, "values and gradients are those of one device"
    return found


def gathered(run) -> list:
    """All-gathers of what looks like a kernel."""
    kernels = {tuple(shape[-2:]) for shape in run["kernels"]}
    told = run["looped"] + run["around"]
    return [shapes for kind, shapes in told if kind == "all-gather" and any(tuple(s[-2:]) in kernels for s in shapes)]


def test_activations_move_by_messages_between_neighbours_and_parameters_stay():
    run = run_on("stage 4, data 2")
    # Forward one message of [1, b, T, D]; backward the last stage's goes apart from the others'.
    assert [shapes for kind, shapes in run["looped"] if kind == "collective-permute"] == [[[1, 2, 14, 32]]] * 3
    assert {kind for kind, _ in run["looped"]} == {"collective-permute", "all-reduce"}
    # Outside, rows are split over the stages too: they go to their microbatches and back, as [..., T] or [..., T, D].
    moved = [shape for kind, shapes in run["around"] if kind != "all-reduce" for shape in shapes]
    assert moved and all(shape[-1:] == [14] or shape[-2:] == [14, 32] for shape in moved)
    assert not gathered(run)


@pytest.mark.slow
def test_with_repeats_parameters_are_exchanged_and_never_gathered():
    run = run_on("stage 2 twice, tensor 2, data 2")
    assert not gathered(run)
    moved = [shapes for kind, shapes in run["around"] if kind == "all-to-all"]
    assert len([shapes for shapes in moved if len(shapes[0]) == 6]) == 2 * len(run["kernels"]), "there, gradients back"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'polygpt[tpu]'")
@pytest.mark.parametrize("mesh", [MeshSpec(stage=4), MeshSpec(stage=2, repeats=2, tensor=2)], ids=["once", "twice"])
def test_stages_compile_for_tpus_with_their_kernels(mesh):
    attention = MultiHead(4, head_width=64, backend="flex", strict=True)
    model = bind(tiny(adapters={}, depth=8, width=256, attention=attention, dtype="bfloat16", remat="full"), 512)
    batch = build([[example(400, seed=i), example(112, seed=i)] for i in range(16)], 512, adapters={})
    layout = sharding.make_layout(mesh, topology.devices("v5e:2x4"))
    shapes = model.abstract()
    places = sharding.tree_shardings(layout, shapes, model.axes())

    def place(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def loss(params, batch):
        return jnp.sum(model.apply(params, batch).logits_BTV * batch.weight_BT[..., None])

    def gradients(params, batch):
        with sharding.use_layout(layout):
            return jax.grad(loss)(params, batch)

    rows = jax.tree.map(lambda x: place(x, layout.sharding(("batch", *[None] * (x.ndim - 1)), x.shape)), batch)
    with dispatch.compiling_for("tpu"):
        lowered = jax.jit(gradients, out_shardings=places).lower(jax.tree.map(place, shapes, places), rows)
        text = topology.compiled(lowered).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3, "flex attention: forward, and backward twice"
    assert "collective-permute" in text
