"""Activations inside a model: which they are, in every form of a stack, and that asking for none changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from batches import LIGHT, build, example, lively, tiny
from polygpt import sharding
from polygpt.attention.contract import Context
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.block import BlockSpec, Layer, Sequential
from polygpt.blocks.parallel import Parallel
from polygpt.blocks.sandwich import Sandwich
from polygpt.errors import SpecError
from polygpt.models.decoder import MASKS, metadata
from polygpt.models.functional import bind
from polygpt.sharding import MeshSpec

T = 14
ROWS = [[example(("image", 4), 5, seed=1), example(4, seed=2)], [example(12, seed=3)]]
BATCH = build(ROWS, T)
TEXT_ONLY = build([[example(9, seed=1), example(4, seed=2)], [example(12, seed=3)]], T, adapters={})
SITES = ("residual", "attention", "mlp")


def blocks_of(model, params):
    """The L blocks of a decoder as modules of their own, in order."""
    decoder, period = model.module(params).decoder, len(model.spec.decoder.period())
    if not model.spec.decoder.scan:
        return list(decoder.blocks)
    held = decoder.blocks if period > 1 else [decoder.blocks]

    def one(layer):
        graphdef, state = nnx.split(held[layer % period])
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer // period], state))

    return [one(layer) for layer in range(model.spec.decoder.depth)]


def test_embeddings_of_media_are_those_that_enter_the_row():
    model = bind(tiny(adapters=LIGHT, depth=1), 31)
    params = lively(model, scale=0.2)
    hidden_BTD, _, found = jax.jit(lambda params: model.hidden(params, BATCH, capture=("media/image",)))(params)
    row_BTD = jax.jit(lambda params: model.module(params).embed(BATCH)[0])(params)
    at_T = np.flatnonzero(BATCH.modality_BT[0] == 1)
    embedded_ND = np.asarray(found["media/image"])[0].reshape(-1, 16)
    np.testing.assert_allclose(row_BTD[0, at_T], embedded_ND[BATCH.slot_BT[0, at_T]], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(hidden_BTD, jax.jit(model.hidden)(params, BATCH)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scan": False, "remat": "full", "norm_placement": "post"},
        {"depth": 4, "pattern": (None, Layer(MultiHead(2), block=Parallel())), "remat": "dots"},
        {"depth": 3, "pattern": (Layer(block=Sandwich()), None), "scan": False},
    ],
    ids=["scanned", "unrolled, remat, post-norm", "pattern, remat", "unrolled pattern"],
)
def test_sites_are_what_the_blocks_compute(fields):
    model = bind(tiny(adapters={}, **fields), 31)
    params = lively(model, scale=0.2)
    found = jax.jit(lambda params, batch: model.hidden(params, batch, capture=SITES))(params, TEXT_ONLY)
    plain = jax.jit(model.hidden)(params, TEXT_ONLY)
    np.testing.assert_array_equal(found[0], plain[0])
    captured = found[2]
    L = model.spec.decoder.depth
    assert {site: x.shape for site, x in captured.items()} == {site: (L, 2, T, 16) for site in SITES}

    @jax.jit
    def by_hand(params, batch):
        module, meta = model.module(params), metadata(batch, 0)
        x_BTD = module.embed(batch)[0]
        context = Context(meta, meta, MASKS["spans"], coordinate_BT3=batch.coordinate_BT3, inputs_BTD=x_BTD)
        layers = []
        for block in blocks_of(model, params):
            branches = {}
            for name in ("attention", "mlp"):
                watched(block, name, branches)
            x_BTD = block(x_BTD, context)[0]
            layers.append(branches | {"residual": x_BTD})
        return layers

    for layer, expected in enumerate(by_hand(params, TEXT_ONLY)):
        for site in SITES:
            error = np.abs(captured[site][layer] - expected[site]).max()
            assert error <= 2e-5, f"{site} of block {layer}"


def watched(block, name, seen):
    """Makes a branch of a block note its output."""
    branch = getattr(block, name)

    def call(*arguments):
        output = branch(*arguments)
        seen[name] = output[0] if isinstance(output, tuple) else output
        return output

    object.__setattr__(block, name, call)


def test_towers_have_sites_of_their_own():
    model = bind(tiny(depth=1), 31)
    params = lively(model, scale=0.2)
    sites = ("adapters/image/residual", "adapters/audio/mlp", "attention")
    found = jax.jit(lambda params: model.hidden(params, BATCH, capture=sites)[2])(params)
    assert {site: x.shape for site, x in found.items()} == {
        "adapters/image/residual": (1, 4, 4, 8),
        "adapters/audio/mlp": (1, 4, 8, 8),
        "attention": (1, 2, T, 16),
    }
    tower = model.module(params).adapters["image"].tower
    pixels = BATCH.media["image"].features.reshape(4, 8, 8, 1)
    length_B = BATCH.media["image"].length_BN.reshape(4)
    encoded, _ = jax.jit(model.module(params).adapters["image"].encode)(pixels, length_B)
    np.testing.assert_allclose(tower.norm(found["adapters/image/residual"][0])[0], encoded[0], rtol=0, atol=1e-5)


def test_dropped_paths_and_gradients_pass_through_what_is_captured():
    model = bind(tiny(adapters={}, drop_path=0.9, depth=3, remat="full"), 31)
    params, key = lively(model, scale=0.2), jax.random.key(3)

    def read(params, of):
        hidden_BTD, _, found = model.hidden(params, TEXT_ONLY, key, capture=("residual",))
        last_BTD = model.module(params).decoder.norm(found["residual"][-1])
        return jnp.sum((last_BTD if of == "site" else hidden_BTD) ** 3), found["residual"]

    (value, residual), gradient = jax.jit(jax.value_and_grad(read, has_aux=True), static_argnums=1)(params, "site")
    expected, of_hidden = jax.jit(jax.value_and_grad(read, has_aux=True), static_argnums=1)(params, "hidden")
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), gradient, of_hidden)
    kept = [(residual[i] == residual[i - 1]).all(axis=(1, 2)) for i in (1, 2)]
    assert np.any(kept), "a row that skips a block has the stream that it had"


def test_asking_for_nothing_compiles_the_same_program(monkeypatch):
    model = bind(tiny(adapters={"image": LIGHT["image"]}, remat="dots", dropout=0.1), 31)
    params, key = model.abstract(), jax.random.key(0)
    batch = build(ROWS, T, adapters={"image": LIGHT["image"]})

    def program():
        loss = jax.grad(lambda params: jnp.sum(model.hidden(params, batch, key)[0] ** 2))
        return jax.jit(lambda params: loss(params)).lower(params).as_text()

    usual = program()
    monkeypatch.setattr(Context, "record", lambda self, name, value: value)
    assert program() == usual
    monkeypatch.setattr(Context, "record", lambda self, name, value: value + 1)
    assert program() != usual, "the blocks do pass through it"


@dataclasses.dataclass(frozen=True)
class Silent(BlockSpec):
    """A block that somebody wrote before there was anything to capture."""

    def build(self, parts, rngs):
        return SilentBlock(parts, rngs)


class SilentBlock(nnx.Module):
    def __init__(self, parts, rngs):
        self.inner = Sequential().build(parts, rngs)

    def __call__(self, x_BTD, context, cache=None, key=None):
        return self.inner(x_BTD, dataclasses.replace(context, recorder=None), cache, key)


class Chatty(SilentBlock):
    def __call__(self, x_BTD, context, cache=None, key=None):
        context.record("doubled", 2 * x_BTD)
        return super().__call__(x_BTD, context, cache, key)


def test_blocks_of_one_s_own_may_record_nothing_or_more(monkeypatch):
    model = bind(tiny(adapters={}, block=Silent()), 31)
    params = lively(model, scale=0.2)
    found = model.hidden(params, TEXT_ONLY, capture=("residual",))[2]["residual"]
    with pytest.raises(SpecError, match="no site 'mlp': SilentBlock does not record it; there are residual"):
        model.hidden(params, TEXT_ONLY, capture=("residual", "mlp"))
    monkeypatch.setattr(Silent, "build", lambda self, parts, rngs: Chatty(parts, rngs))
    chatty = bind(model.spec, 31)
    doubled = chatty.hidden(params, TEXT_ONLY, capture=("doubled",))[2]["doubled"]
    np.testing.assert_allclose(doubled[1], 2 * found[0], rtol=1e-6)


@pytest.mark.parametrize(
    "fields, batch, site, message",
    [
        ({}, BATCH, "residul", "no site 'residul': Block does not record it; did you mean residual"),
        ({}, BATCH, "media/imag", "no site 'media/imag': did you mean media/image"),
        ({}, TEXT_ONLY, "media/image", "'media/image' is not computed: the batch has no media"),
        ({}, BATCH, "adapters/imag/mlp", "no site 'adapters/imag/mlp': did you mean adapters/image/mlp"),
        ({"depth": 0}, BATCH, "mlp", "no site 'mlp': its stack has no blocks"),
        ({}, dataclasses.replace(BATCH, media={}), "adapters/audio/mlp", "'adapters/audio/mlp' is not computed: the"),
    ],
)
def test_a_site_that_is_not_there_is_told(fields, batch, site, message):
    model = bind(tiny(**fields), 31)
    with pytest.raises(SpecError, match=message):
        jax.eval_shape(lambda params: model.hidden(params, batch, capture=(site,)), model.abstract())


def test_pipeline_stages_capture_nothing():
    sizes = tuple(2 if axis == "stage" else 1 for axis in sharding.AXES)
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    model = bind(tiny(adapters={}), 31).on(sharding.MeshLayout(mesh, MeshSpec(data=1, stage=2)))
    with pytest.raises(SpecError, match="train.mesh.stage is 2: it must be 1 to capture 'mlp' inside the blocks"):
        jax.eval_shape(lambda params: model.hidden(params, TEXT_ONLY, capture=("mlp",)), model.abstract())
