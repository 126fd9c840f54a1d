"""Compiling for TPUs without a TPU: names, what is missing, one program; nothing of it is left in the process."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from polygpt import topology
from polygpt.errors import UserError

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SETTING = "jax_persistent_cache_min_compile_time_secs"


@pytest.mark.parametrize("name", ["", "v5e", "v5e-8", "v7x", "v8:2x2", "v2:2x2", "v5e:2x2x2", "v5e:32x32", "v5p:2x2"])
def test_a_name_that_no_slice_has_is_refused_in_one_line(name):
    with pytest.raises(UserError) as refused:
        topology.devices(name)
    message = str(refused.value)
    assert repr(name) in message and "accepted" in message and "2x2" in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-128", "v5p-128 counts cores, 2 per chip: 64 chips are v5p:4x4x4"),
        ("v5e-256", "v5e-256 counts chips: it is v5e:16x16"),
        ("v5litepod-4", "v5litepod-4 counts chips: it is v5e:2x2"),
        ("v6e-7", "v6e-7 counts chips: no slice has that many"),
        ("v5p-7", "v5p-7 counts cores, 2 per chip: no slice has that many"),
        ("v5e:2x2", None),
        ("h100-8", None),
    ],
)
def test_what_google_calls_a_slice_is_translated(name, said):
    assert topology.explain_name(name) == said


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tpu\]'"):
        topology.devices("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize(
    "name, slices, count, kind",
    [
        ("v4:2x2x1", 1, 4, "TPU v4"),  # megacore: a device a chip
        ("v5e:1x1", 1, 1, "TPU v5 lite"),
        ("v5e:16x16", 2, 512, "TPU v5 lite"),
        ("v5p:4x4x12", 1, 192, "TPU v5"),
        ("v6e:2x4", 1, 8, "TPU v6 lite"),
        ("tpu7x:2x2x1", 1, 8, "TPU7x"),  # two devices a chip
    ],
)
def test_slices_have_their_devices(name, slices, count, kind):
    before = dict(os.environ)
    found = topology.devices(name, slices)
    assert len(found) == count and found[0].device_kind == kind
    assert dict(os.environ) == before and jax.default_backend() == "cpu"


@needs_libtpu
def test_a_program_is_compiled_by_the_tpu_compiler():
    def loss(parameters, x_BD):
        return jnp.tanh(x_BD @ parameters["weight"]).sum()

    shapes = {"weight": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)}, jnp.ones((8, 256), jnp.bfloat16)
    compiled = topology.compile_for("v5e:2x2", jax.grad(loss), *shapes)
    assert "T(8,128)" in compiled.as_text()  # the tiles of a TPU's memory
    assert compiled.memory_analysis().output_size_in_bytes == 256 * 256 * 2
    assert (jax.jit(jax.grad(loss))({"weight": jnp.ones((2, 2))}, jnp.zeros((1, 2)))["weight"] == 0).all()


@needs_libtpu
def test_what_does_not_fit_is_said_with_both_figures():
    big = jax.ShapeDtypeStruct((100_000, 100_000), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED.*74.*15.75G"):
        topology.compile_for("v5e:1x1", lambda x: jnp.sin(x) @ x, big)


@needs_libtpu
def test_the_persistent_cache_is_left_alone(tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    before = {n: getattr(jax.config, n) for n in ("jax_compilation_cache_dir", SETTING)}
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update(SETTING, 0.0)
    try:
        topology.compile_for("v5e:2x2", lambda x: x + 1, jax.ShapeDtypeStruct((8,), jnp.float32))
        assert list(tmp_path.iterdir()) == [] and getattr(jax.config, SETTING) == 0.0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
