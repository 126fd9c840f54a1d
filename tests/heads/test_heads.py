"""Heads: what they read, their metadata, and models that have them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batches import build, example, lively, tiny
from polygpt.errors import SpecError
from polygpt.heads.base import pooled
from polygpt.heads.linear import LinearHead
from polygpt.heads.projection import ProjectionHead
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.objectives.forward import Forward
from polygpt.optim.mup import MuP
from polygpt.parameters import paths

T = 12
ROWS = [[example(5, seed=1), example(4, seed=2)], [example(7, seed=3)], []]
HEADS = {"kind": LinearHead(3, pool="mean"), "join": ProjectionHead(4, bias=-10.0)}


def test_pooling_is_the_mean_or_the_first_of_the_own_example():
    batch = build(ROWS, T, adapters={})
    hidden = np.float32(np.random.default_rng(0).normal(size=(3, T, 8)))
    hidden[batch.segment_BT == 0] = np.nan
    mean, first = (np.asarray(pooled(pool, hidden, batch)) for pool in ("mean", "first"))
    for row, start, stop in ((0, 0, 5), (0, 5, 9), (1, 0, 7)):
        own = hidden[row, start:stop].astype(np.float64)
        np.testing.assert_allclose(mean[row, start:stop], np.tile(own.mean(axis=0), (stop - start, 1)), atol=1e-6)
        np.testing.assert_array_equal(first[row, start:stop], np.tile(hidden[row, start], (stop - start, 1)))
    for found in (mean, first):
        assert not found[batch.segment_BT == 0].any()
    np.testing.assert_array_equal(pooled("last", hidden, batch), hidden)


def test_padding_reaches_neither_a_pooled_vector_nor_its_gradient():
    batch = build(ROWS, T, adapters={})
    hidden = np.float32(np.random.default_rng(0).normal(size=(3, T, 8)))
    dirty = np.where((batch.segment_BT == 0)[..., None], np.nan, hidden)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(pooled("mean", x, batch))))
    np.testing.assert_array_equal(gradient(dirty), gradient(hidden))
    assert np.isfinite(gradient(dirty)).all()


def test_a_linear_head_is_a_linear_map():
    batch, hidden = build(ROWS, T, adapters={}), np.float32(np.random.default_rng(0).normal(size=(3, T, 8)))
    head = LinearHead(3).build(8, rngs=nnx.Rngs(0), dtype="float32")
    head.map.bias[...] = jnp.arange(3.0)
    np.testing.assert_allclose(head(hidden, batch), hidden @ np.asarray(head.map.kernel[...]) + [0, 1, 2], atol=1e-5)
    assert head.scalars() == {}


def test_a_projection_has_unit_length_and_a_bounded_scale():
    batch, hidden = build(ROWS, T, adapters={}), np.float32(np.random.default_rng(0).normal(size=(3, T, 8)))
    hidden[0, 0] = 0
    head = ProjectionHead(4, temperature=0.5, max_scale=10.0).build(8, rngs=nnx.Rngs(0), dtype="float32")
    found = np.asarray(head(hidden, batch))
    mapped = hidden.astype(np.float64) @ np.asarray(head.map.kernel[...], np.float64)
    mapped[0, 0] = 1
    expected = mapped / np.linalg.norm(mapped, axis=-1, keepdims=True)
    expected[0, 0] = 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: head(x, batch)[0, 0, 0])(hidden)).all(), "of a vector of length 0 too"
    np.testing.assert_allclose(head.scalars()["scale"], 2, rtol=1e-6)
    assert set(head.scalars()) == {"scale"}
    for value, slopes in ((1.0, (np.e, -np.e)), (99.0, (10.0, 0.0))):  # at the limit it can only come back
        head.log_scale[...] = jnp.float32(value)
        np.testing.assert_allclose(head.scalars()["scale"], min(np.exp(value), 10), rtol=1e-6)
        for sign, slope in zip((1, -1), slopes, strict=True):
            gradient = nnx.grad(lambda head, sign=sign: sign * head.scalars()["scale"])(head)
            np.testing.assert_allclose(gradient["log_scale"][...], slope, rtol=1e-6)


def test_a_model_with_heads_has_their_parameters_and_those_of_the_model_without():
    plain, model = bind(tiny(adapters={}), 31), bind(tiny(adapters={}).replace(heads=HEADS), 31)
    own = {name: traits for name, traits in paths(model.traits).items() if name.startswith("heads/")}
    assert {name: (traits.shape, traits.decays) for name, traits in own.items()} == {
        "heads/kind/map/kernel": ((16, 3), True),
        "heads/kind/map/bias": ((3,), False),
        "heads/join/map/kernel": ((16, 4), True),
        "heads/join/log_scale": ((), False),
        "heads/join/bias": ((), False),
    }
    assert own["heads/kind/map/kernel"].axes == ("width", None)
    params, without = (paths(one.init(jax.random.key(0))) for one in (model, plain))
    assert set(params) - set(own) == set(without)
    for name, value in without.items():
        np.testing.assert_array_equal(params[name], value)
    batch = build(ROWS, T, adapters={})
    logits, expected = (jax.jit(one.apply)(one.init(jax.random.key(0)), batch).logits_BTV for one in (model, plain))
    np.testing.assert_array_equal(logits, expected)


def test_heads_are_counted():
    parts = {part.name: part for part in describe(tiny(adapters={}).replace(heads=HEADS), 31, 16).parts}
    assert parts["heads/kind"].parameters == 16 * 3 + 3 and parts["heads/kind"].flops == 2 * 16 * 3
    assert parts["heads/join"].parameters == 16 * 4 + 2


def test_under_mup_a_head_is_an_output_layer():
    mup = MuP({"decoder.width": 8, "decoder.attention.heads": 2, "decoder.attention.kv_heads": 1})
    model = bind(tiny(adapters={}).replace(heads=HEADS, mup=mup), 31)
    growth = paths(model.growth)
    assert growth["heads/kind/map/kernel"].kind == "output" and growth["heads/kind/map/kernel"].entrywise == 0.5
    assert growth["heads/join/log_scale"].kind == growth["heads/kind/map/bias"].kind == "fixed"


def test_each_head_is_computed_once_and_an_unknown_one_is_named():
    model = bind(tiny(adapters={}).replace(heads=HEADS), 31)
    forward = Forward(model, lively(model), build(ROWS, T, adapters={}))
    assert forward.head("kind") is forward.head("kind")
    assert math.isclose(forward.head_scalars("join")["bias"], lively(model)["heads"]["join"]["bias"], rel_tol=1e-6)
    with pytest.raises(SpecError, match="the head 'kinds', which is not in model.heads: did you mean kind"):
        forward.head("kinds")
