"""The contracts of attention variants, adapters and the parts of a block, held by every class found in the folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from discovery import minimal, specs
from flax import nnx

from batches import build, columns, example, lively, tiny
from polygpt.adapters.base import Adapter
from polygpt.attention.contract import Attention
from polygpt.attention.masks import Mask
from polygpt.heads.base import Head
from polygpt.models.functional import bind
from polygpt.nn.mlp import FeedForward
from polygpt.nn.norms import Norm
from polygpt.nn.positions import Position
from polygpt.objectives.forward import Forward
from polygpt.sequence import Media
from polygpt.spec import Spec, field_help, from_json, hints, to_json

ATTENTION = [one for one in specs("polygpt.attention", Attention) if one.values[0].build is not Attention.build]
ADAPTERS = specs("polygpt.adapters", Adapter)
PARTS = specs("polygpt.nn", Norm) + specs("polygpt.nn", FeedForward) + specs("polygpt.nn", Position)
PARTS += specs("polygpt.attention", Position)
FOLDERS = ("nn", "attention", "blocks", "adapters", "heads", "models", "data", "objectives")
ALL = [parameter for folder in FOLDERS for parameter in specs(f"polygpt.{folder}", Spec)]


@pytest.mark.parametrize("cls", ALL)
def test_a_specification_explains_itself_and_goes_through_json(cls):
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), "dataclasses write a docstring of no use"
    if not issubclass(cls, Mask):
        assert set(hints(cls)) <= set(field_help(cls)), "every field has a help text"
    spec = minimal(cls)
    assert from_json(to_json(spec)) == spec


# --- attention through a whole model (what one layer must do, `polygpt attention check` measures) --------------------

T = 10
ROWS = [[example(6, seed=1), example(3, seed=2)], [example(9, seed=3)], []]


@pytest.fixture(scope="module", params=ATTENTION)
def variant(request):
    """(model with the variant, its parameters, a batch, jitted apply, jitted decode)"""
    model = bind(tiny(adapters={}, attention=request.param()), 31)
    batch = build(ROWS, T, adapters={})
    return model, lively(model), batch, jax.jit(model.apply), jax.jit(model.decode)


def test_attention_keeps_shape_and_is_finite(variant):
    _, params, batch, apply, _ = variant
    outputs = apply(params, batch)
    assert outputs.hidden_BTD.shape == (3, T, 16) and outputs.logits_BTV.dtype == jnp.float32
    assert np.isfinite(outputs.logits_BTV).all()


def test_attention_with_a_cache_equals_attention_without(variant):
    model, params, batch, apply, decode = variant
    one = jax.tree.map(lambda x: x[1:2], batch)
    expected = np.asarray(apply(params, batch).logits_BTV)[1]
    cache, got = model.init_cache(1, T), []
    for t in (
        0,
        3,
        6,
    ):  # pieces of one length are one program; single steps: attention check, test_variants.py
        logits_BTV, cache = decode(params, columns(one, t, t + 3, media=False), cache)
        got.append(logits_BTV)
    np.testing.assert_allclose(np.concatenate(got, axis=1)[0], expected[:9], rtol=0, atol=1e-5)


def test_attention_computes_in_bfloat16(variant):
    model = bind(model_spec := variant[0].spec.replace(dtype="bfloat16"), 31)
    batch = variant[2]
    outputs = jax.eval_shape(model.apply, model.abstract(), batch)
    assert (outputs.hidden_BTD.dtype, outputs.logits_BTV.dtype) == (jnp.bfloat16, jnp.float32)
    cache = jax.eval_shape(lambda: model.init_cache(2, 6))
    assert len(cache.layers) == model_spec.decoder.depth, "one cache per block"
    for leaf in jax.tree.leaves(cache.layers):
        assert leaf.shape[0] == 2, "the axis of rows"


def test_attention_counts_its_flops(variant):
    attention = variant[0].spec.decoder.attention
    assert attention.score_flops(16, 20) >= attention.score_flops(16, 10) >= 0


# --- norms, feed-forward layers, positions ----------------------------------------------------------------------------

FIELD = {Norm: "norm", FeedForward: "mlp", Position: "position"}


@pytest.mark.parametrize("cls", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_fits_into_every_model(cls, dtype):
    field = next(name for base, name in FIELD.items() if issubclass(cls, base))
    model = bind(tiny(adapters={}, dtype=dtype, **{field: cls()}), 31)
    outputs = jax.eval_shape(model.apply, model.abstract(), build(ROWS, T, adapters={}))
    assert outputs.hidden_BTD.shape == (3, T, 16) and outputs.hidden_BTD.dtype == dtype


# --- adapters ---------------------------------------------------------------------------------------------------------


def small(cls) -> Adapter:
    """The adapter with its defaults, but for clips of a fraction of a second where its features are clips."""
    adapter = cls(items=2)
    if "seconds" in hints(type(adapter.features)):
        adapter = adapter.replace(features=adapter.features.replace(seconds=0.16))
    return adapter


@pytest.mark.parametrize("cls", ADAPTERS)
def test_an_adapter_fills_the_positions_that_it_says(cls):
    adapter = cls()
    features = np.zeros((2, adapter.items, *adapter.features.shape), np.float32)
    media = Media(features, np.full((2, adapter.items), adapter.positions, np.int32))
    embedded, losses = jax.eval_shape(lambda media: adapter.build(24, rngs=nnx.Rngs(0), dtype="float32")(media), media)
    assert losses == {} and embedded.shape == (2, adapter.items, adapter.positions, 24)
    lengths = [adapter.length(frames) for frames in range(1, adapter.features.shape[0] + 1)]
    assert lengths == sorted(lengths) and lengths[0] >= 1 and lengths[-1] == adapter.positions
    assert adapter.score_flops >= 0


@pytest.mark.parametrize("cls", ADAPTERS)
def test_an_adapter_is_blind_to_unused_items(cls):
    adapter = small(cls)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: adapter.build(16, rngs=nnx.Rngs(0), dtype="float32")))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: np.float32(rng.normal(0.1, 0.3, x.shape)), state)
    features = np.float32(rng.normal(size=(1, 2, *adapter.features.shape)))
    length_BN = np.int32([[adapter.positions, 0]])

    @jax.jit
    def run(state, features):
        def total(state):
            out, _ = nnx.merge(graphdef, state)(Media(features, length_BN))
            return jnp.sum(jnp.sin(out[:, 0])), out

        return jax.value_and_grad(total, has_aux=True)(state)

    (_, clean), clean_gradient = run(state, features)
    for garbage in (np.nan, np.inf):
        features[0, 1] = garbage
        (_, dirty), gradient = run(state, features)
        np.testing.assert_array_equal(clean[:, 0], dirty[:, 0])
        assert np.isfinite(dirty).all()
        for a, b in zip(jax.tree.leaves(clean_gradient), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.isfinite(b).all()


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", specs("polygpt.heads", Head))
@pytest.mark.parametrize("pool", ["last", "mean", "first"])
def test_a_head_gives_the_same_numbers_to_an_example_alone_and_packed(cls, pool):
    heads = {"own": cls(outputs=3, pool=pool)}
    model = bind(tiny(adapters={}).replace(heads=heads), 31)
    params = lively(model)

    @jax.jit
    def outputs(params, batch):
        return Forward(model, params, batch).head("own")

    packed = build(ROWS, T, adapters={})
    found = outputs(params, packed)
    assert found.shape == (3, T, 3) and found.dtype == jnp.float32 and np.isfinite(found).all()
    alone = outputs(params, build([[example(6, seed=1)], [example(3, seed=2)], [example(9, seed=3)]], T, adapters={}))
    for row, here, there in (
        (0, (0, slice(6)), slice(6)),
        (1, (0, slice(6, 9)), slice(3)),
        (2, (1, slice(9)), slice(9)),
    ):
        np.testing.assert_allclose(found[here], alone[row, there], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", specs("polygpt.heads", Head))
def test_a_head_reads_bfloat16_and_gives_float32(cls):
    model = bind(tiny(adapters={}, dtype="bfloat16").replace(heads={"own": cls(outputs=3, pool="mean")}), 31)
    batch = build(ROWS, T, adapters={})
    found = jax.eval_shape(lambda params: Forward(model, params, batch).head("own"), model.abstract())
    assert found.shape == (3, T, 3) and found.dtype == jnp.float32
    scalars = jax.eval_shape(lambda params: Forward(model, params, batch).head_scalars("own"), model.abstract())
    assert all(scalar.shape == () and scalar.dtype == jnp.float32 for scalar in scalars.values())
