"""Gradients of linear layers before devices sum them: their dtype, and how TPUs exchange them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polygpt import sharding, topology
from polygpt.nn.linear import Linear, product
from polygpt.runtime.compilation import compiler_options
from polygpt.scale.plan import hlo
from polygpt.scale.plan.collectives import collectives
from polygpt.scale.plan.target import target
from polygpt.sharding import MeshSpec

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize("reduce_dtype, off", [("compute", 2**-8), ("float32", 1e-6)])
def test_gradients_are_rounded_after_the_sum_over_devices_if_that_is_in_float32(reduce_dtype, off):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(2, 65, width)), "bfloat16") for width in (8, 24))
    layer = Linear(8, 24, rngs=nnx.Rngs(0), bias=False, dtype="bfloat16")

    def scalar(layer, x):
        return jnp.sum(layer(x).astype(jnp.float32) * dy.astype(jnp.float32))

    with sharding.use_layout(sharding.make_layout(MeshSpec(reduce_dtype=reduce_dtype), jax.devices()[:1])):
        of_layer, of_x = jax.jit(nnx.grad(scalar, argnums=(0, 1)))(layer, x)
    wide = {"x": np.float64(x), "dy": np.float64(dy), "kernel": np.float64(layer.kernel[...].astype("bfloat16"))}
    kernel = np.einsum("bti,bto->io", wide["x"], wide["dy"])
    gap = np.linalg.norm(np.float64(of_layer.kernel[...]) - kernel) / np.linalg.norm(kernel)
    assert off / 20 < gap < off, gap
    np.testing.assert_allclose(np.float64(of_x), wide["dy"] @ wide["kernel"].T, rtol=2**-7, atol=2**-7)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("reduce_dtype, name", [("compute", "bf16"), ("float32", "f32")])
@pytest.mark.parametrize(
    "at, mesh", [("v5e:16x16", {"fsdp": 128, "tensor": 2}), ("v5p:4x4x4", {"data": 2, "fsdp": 32})]
)
def test_tpus_scatter_the_sums_of_gradients(at, mesh, reduce_dtype, name):
    """No device receives the sum of a whole gradient, of which it keeps one part in many."""
    layout = sharding.make_layout(MeshSpec(**{"data": 1} | mesh, reduce_dtype=reduce_dtype), target(at).devices())
    rows, T, inputs, outputs = 128, 64, 4096, 11_008

    def loss(kernel, x):
        y = sharding.constrain(product(x, kernel, "bfloat16"), "batch", "positions", "hidden")
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    def gradient(*given):
        with sharding.use_layout(layout):
            return jax.grad(loss)(*given)

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape))

    kernel = array((inputs, outputs), "float32", "width", "hidden")
    x = array((rows, T, inputs), "bfloat16", "batch", "positions", None)
    options = {"out_shardings": kernel.sharding, "compiler_options": compiler_options("tpu")}
    with jax.set_mesh(layout.mesh):
        text = topology.compiled(jax.jit(gradient, **options).lower(kernel, x)).as_text()
    found = collectives(hlo.parse(text), dict(layout.mesh.shape))
    over = [(one.kind, one.dtype) for one in found if one.axes == ("fsdp",)]
    assert sorted(over) == [("all-gather", "bf16"), ("reduce-scatter", name)]
