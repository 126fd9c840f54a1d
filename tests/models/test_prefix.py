"""Prefix tuning: softmax over prefix and sequence, by every backend, with and without a cache; the rest is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import ADAPTERS, LIGHT, build, columns, example, lively, tiny
from polygpt.attention.cross import GatedCross
from polygpt.attention.differential import Differential
from polygpt.attention.gated import GatedOutput
from polygpt.attention.latent import MultiHeadLatent
from polygpt.attention.mamba2 import Mamba2
from polygpt.attention.multi_head import MultiHead
from polygpt.attention.off_by_one import SoftmaxOffByOne
from polygpt.attention.sigmoid import SigmoidAttention
from polygpt.attention.sliding import SlidingWindow
from polygpt.errors import SpecError
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.models.low_rank import LowRank
from polygpt.models.prefix import ADDED, PrefixTuning
from polygpt.nn.positions import NoPosition
from polygpt.optim.mup import MuP
from polygpt.parameters import paths, tree_of

P = PrefixTuning(length=3)


def bound(prefix=P, **options):
    model = bind(tiny(**{"adapters": {}} | options).replace(prefix=prefix), 31)
    return model, lively(model)


def test_attention_is_softmax_over_prefix_and_sequence():
    """One block in float64 NumPy, written from the paper's [P_k; K], [P_v; V]."""
    model, params = bound(depth=1, scan=False, position=NoPosition())
    batch = build([(example(6),)], 6, adapters={})
    module, values = model.module(params), {name: np.float64(value) for name, value in paths(params).items()}
    block, inner = module.decoder.blocks[0], "decoder/blocks/0/attention"
    x_TD = np.random.default_rng(0).normal(size=(6, 16))
    context = module.decoder._context(batch, None)[0]
    found = block.attention(jnp.float32(x_TD)[None], context)[0][0]

    def heads(x_TE, n):
        return x_TE.reshape(len(x_TE), n, -1).swapaxes(0, 1)

    query_HTd = heads(x_TD @ values[f"{inner}/query/kernel"], 4) / 2
    rows = {name: heads(x_TD @ values[f"{inner}/{name}/kernel"], 2) for name in ("key", "value")}
    prefix = {name: heads(values[f"{inner}/prefix/{name}"], 2) for name in ("key", "value")}
    key_HSd, value_HSd = (np.repeat(np.concatenate([prefix[n], rows[n]], 1), 2, 0) for n in ("key", "value"))
    score_HTS = query_HTd @ key_HSd.swapaxes(1, 2)
    score_HTS[:, np.arange(9)[None] - 3 > np.arange(6)[:, None]] = -np.inf
    weight_HTS = np.exp(score_HTS - score_HTS.max(-1, keepdims=True))
    weight_HTS /= weight_HTS.sum(-1, keepdims=True)
    expected = (weight_HTS @ value_HSd).swapaxes(0, 1).reshape(6, -1) @ values[f"{inner}/output/kernel"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    drawn = block.attention.weights(jnp.float32(x_TD)[None], context)[0]
    np.testing.assert_allclose(drawn, weight_HTS[:, :, 3:], rtol=0, atol=1e-6)


ATTENTIONS = {
    "flex": MultiHead(4, 2, backend="flex"),
    "chunked": MultiHead(4, 2, backend="chunked"),
    "window": SlidingWindow(4, window=5),
    "gated": GatedOutput(4),
}


@pytest.mark.parametrize(
    "name", ["flex", *(pytest.param(name, marks=pytest.mark.slow) for name in ATTENTIONS if name != "flex")]
)
def test_every_backend_packs_and_caches_it(name):
    attention = ATTENTIONS[name]
    model, params = bound(attention=attention)
    parts = example(9, seed=1), example(7, seed=2)
    batch = build([parts, (parts[1], parts[0])], 20, adapters={})
    whole = np.asarray(jax.jit(model.apply)(params, batch).logits_BTV)
    np.testing.assert_allclose(whole[0, :9], whole[1, 7:16], rtol=0, atol=2e-5)
    np.testing.assert_allclose(whole[0, 9:16], whole[1, :7], rtol=0, atol=2e-5)
    reference = bound(attention=attention.replace(backend="reference"))[0]
    np.testing.assert_allclose(whole, jax.jit(reference.apply)(params, batch).logits_BTV, rtol=0, atol=2e-5)
    cache, found, decode = model.init_cache(2, 20), [], jax.jit(model.decode)
    for start, stop in [(0, 12), *((t, t + 1) for t in range(12, 16))]:
        logits_BTV, cache = decode(params, columns(batch, start, stop, media=False), cache)
        found.append(logits_BTV)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole[:, :16], rtol=0, atol=2e-5)


def test_no_position_sees_a_later_one():
    model, params = bound()
    batch = build([(example(12),)], 12, adapters={})
    first, second = jax.jit(model.apply)(params, batch).logits_BTV, None
    tokens_BT = batch.tokens_BT.copy()
    tokens_BT[:, 8:] = (tokens_BT[:, 8:] + 1) % 31
    second = jax.jit(model.apply)(params, batch.replace(tokens_BT=tokens_BT)).logits_BTV
    np.testing.assert_array_equal(first[:, :8], second[:, :8])
    assert np.any(first[:, 8:] != second[:, 8:])


def test_scanned_and_unrolled_blocks_agree_and_each_has_its_own_prefix():
    (model, params), (flat, _) = bound(remat="full"), bound(scan=False)
    values = paths(params)
    unrolled = {}
    for name in paths(flat.traits):
        parts = name.split("/")
        stacked = "/".join([*parts[:2], *parts[3:]]) if name.startswith("decoder/blocks/") else name
        unrolled[name] = values[stacked][int(parts[2])] if stacked != name else values[name]
    batch = build([(example(9),)], 12, adapters={})
    ours = jax.jit(model.apply)(params, batch).logits_BTV
    np.testing.assert_allclose(ours, jax.jit(flat.apply)(tree_of(unrolled), batch).logits_BTV, rtol=0, atol=1e-5)


def test_prefixes_are_trained_and_all_else_is_frozen():
    traits = paths(bound()[0].traits)
    assert {name for name, own in traits.items() if own.trained} == {name for name in traits if ADDED.search(name)}
    own = traits["decoder/blocks/attention/prefix/key"]
    assert (own.shape, own.layers, own.depth, own.decays) == ((2, 3, 8), (0, 1), 2, False)
    traits = paths(bound(PrefixTuning(length=2, pattern="tower", also="^modality/"), adapters=ADAPTERS)[0].traits)
    trained = {name for name, own in traits.items() if own.trained}
    assert trained == {name for name in traits if ADDED.search(name) or name.startswith("modality/")}
    assert {name.split("/")[1] for name in trained} == {"image", "audio"} and len(trained) == 6


def test_low_rank_updates_and_a_prefix_are_trained_together():
    spec = tiny(adapters={}).replace(prefix=P, low_rank=LowRank("query", rank=2, also="^decoder/norm/"))
    model = bind(spec, 31)
    trained = {name for name, own in paths(model.traits).items() if own.trained}
    kinds = {"low" if name.startswith("low_rank/") else "prefix" if ADDED.search(name) else name for name in trained}
    assert kinds == {"low", "prefix", "decoder/norm/scale"}
    assert model.merged.spec.prefix == P and paths(model.merged.traits).keys() == {
        name for name in paths(model.traits) if not name.startswith("low_rank/")
    }
    parts = {part.name: part.parameters for part in describe(spec, 31, 16).parts}
    assert parts["prefix"] == 2 * 2 * 3 * 8 and parts["low_rank"] == 2 * 2 * (16 + 16)


def test_initial_parameters_are_those_of_the_model_without_and_the_prefix_takes_only_weight():
    model, plain = bind(tiny(adapters={}).replace(prefix=P), 31), bind(tiny(adapters={}), 31)
    params, expected = paths(model.init(jax.random.key(3))), paths(plain.init(jax.random.key(3)))
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
    added = {name: params[name] for name in params.keys() - expected.keys()}
    assert len(added) == 2 and not np.any(added["decoder/blocks/attention/prefix/value"])
    key_LPE = added["decoder/blocks/attention/prefix/key"]
    assert 0.7 < np.std(key_LPE) < 1.3 and np.any(key_LPE[0] != key_LPE[1])


def test_padding_gives_finite_values_and_gradients():
    model, params = bound(adapters=LIGHT)
    batch = build([(example(5, ("image", 3), 4),), ()], 16)

    def loss(params):
        return jnp.sum(jnp.where(batch.weight_BT > 0, model.apply(params, batch).logits_BTV[..., 0], 0))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_bfloat16_is_close():
    model, params = bound()
    batch = build([(example(9),)], 12, adapters={})
    expected = jax.jit(model.apply)(params, batch).logits_BTV
    half = bind(model.spec.replace(dtype="bfloat16"), 31)
    found = jax.jit(half.apply)(params, batch).logits_BTV
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "attention, reason",
    [
        (SigmoidAttention(4), "SigmoidAttention has no softmax over keys"),
        (Mamba2(heads=4), "Mamba2 has no softmax over keys"),
        (SoftmaxOffByOne(4), "SoftmaxOffByOne computes more than one softmax"),
        (Differential(4), "Differential computes more than one softmax"),
        (MultiHeadLatent(4), "MultiHeadLatent computes more than one softmax"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_variants_without_a_single_softmax_are_refused(attention, reason):
    with pytest.raises(SpecError, match=f"matches decoder/blocks/attention, and {reason}") as found:
        bound(attention=attention)
    assert "\n" not in str(found.value)


def test_a_pattern_leaves_other_layers_alone():
    options = {"pattern": (Mamba2(heads=4), None), "depth": 4}
    model, _ = bound(PrefixTuning(pattern="decoder/blocks/1/"), **options)
    assert {name for name in paths(model.traits) if ADDED.search(name)} == {
        f"decoder/blocks/1/attention/prefix/{one}" for one in ("key", "value")
    }
    assert paths(model.traits)["decoder/blocks/1/attention/prefix/key"].layers == (1, 3)
    gated, _ = bound(pattern=(None, GatedCross(4)))
    assert sum(bool(ADDED.search(name)) for name in paths(gated.traits)) == 4


def test_what_matches_nothing_is_refused():
    with pytest.raises(SpecError, match="model.prefix.pattern 'tower' matches no attention layer: names are like"):
        bound(PrefixTuning(pattern="tower"))
    with pytest.raises(SpecError, match="model.prefix.also 'nowhere' matches no parameter"):
        bound(dataclasses.replace(P, also="nowhere"))
    with pytest.raises(SpecError, match="prefix"):
        tiny(width=32).replace(prefix=P, mup=MuP({"decoder.width": 16}))
