"""Attention over eight fake devices: gathered keys and the ring, every kind of mask and term, and every variant."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from many_devices import VARIABLES
from polygpt import sharding, topology
from polygpt.attention.kernels import dispatch
from polygpt.attention.kernels.problem import Operands, Rule
from polygpt.attention.masks import DECODER
from polygpt.attention.meta import Meta
from polygpt.errors import SpecError
from polygpt.sharding import MeshSpec


def run(script: str, *arguments) -> dict:
    """What a script prints as JSON."""
    environment = os.environ | VARIABLES
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick():
    return run("attention_on_eight_devices.py", "quick")


def test_values_and_gradients_are_those_of_one_device(quick):
    """Packed rows with spans and padding, rows of padding, masks, terms, few key heads, a decode step."""
    assert len(quick["compared"]) == 12 and "sequence 4, tensor 2, ring, reference: spans" in quick["compared"]


def test_a_ring_refuses_terms_of_pairs(quick):
    assert "pair terms" in quick["refused"] and "train.mesh.context" in quick["refused"]


def test_rows_are_brought_into_zigzag_order_and_back(quick):
    assert quick["exchanged"] == [8, 4]
    in_order, in_zigzag = quick["decoder"]
    assert in_order == 0 and in_zigzag >= 4  # of even and odd chunks, to their devices and back


@pytest.mark.slow
def test_they_are_with_every_mesh_mask_and_backend():
    assert len(run("attention_on_eight_devices.py", "slow")["compared"]) == 128


@pytest.mark.slow
def test_no_device_of_a_ring_holds_the_keys_of_all():
    """What a program with gradients needs a position, of which each of eight devices has an eighth."""
    programs = run("attention_on_eight_devices.py", "programs")
    gather, ring = (programs[context] for context in ("gather", "ring"))
    assert gather["all-gather"] > 0 and gather["collective-permute"] == 0
    assert ring["all-gather"] == 0 and ring["collective-permute"] > 0
    gathered, round_ring = (two - one for one, two in (gather["temporaries"], ring["temporaries"]))
    more, keys_and_values = 2048, 2 * 2 * 64 * 4
    # Keys and values of all devices and the gradients of both, which no device of a ring has.
    assert gathered - round_ring > 0.9 * more * 2 * keys_and_values
    assert round_ring < gathered / 2


@pytest.mark.slow
def test_every_variant_is_the_same_with_rows_positions_and_heads_split():
    found = run("variants_on_eight_devices.py")
    assert len(found) >= 20


def shapes(layout, T: int) -> Operands:
    def shape(dtype, names, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout.sharding(names, sizes))

    meta = Meta(*[shape(jnp.int32, ("batch", "positions"), 1, T)] * 5)
    heads = [(8, "heads"), (2, "kv_heads"), (2, "kv_heads")]
    arrays = [shape(jnp.bfloat16, ("batch", name, "positions", None), 1, count, T, 128) for count, name in heads]
    return Operands(*arrays, meta, meta)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'polygpt[tpu]'")
def test_a_ring_of_kernels_compiles_for_tpus():
    spec = MeshSpec(data=1, sequence=4, tensor=2, context="ring")
    layout = sharding.make_layout(spec, topology.devices("v5e:2x4"))

    def loss(operands, backend="auto"):
        return jnp.sum(dispatch.attend(Rule(DECODER), operands, backend, strict=True)[0].astype(jnp.float32))

    with dispatch.compiling_for("tpu"), sharding.use_layout(layout):
        operands = shapes(layout, 8192)
        text = topology.compiled(jax.jit(jax.grad(loss, allow_int=True)).lower(operands)).as_text()
        refused = "positions are split in a ring, but library cannot compute gradients for a part of the keys"
        with pytest.raises(SpecError, match=refused):
            jax.eval_shape(functools.partial(loss, backend="library"), operands)
    for kernel in ("flex_forward", "flex_backward_query", "flex_backward_key"):
        assert kernel in text
    assert "collective-permute-start" in text and "all-gather" not in text
