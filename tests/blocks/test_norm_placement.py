"""Post-norm blocks: what they compute, in all the ways in which a stack is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import VOCABULARY, build, columns, example, lively, tiny, tiny_model
from polygpt.blocks.pipeline import Schedule
from polygpt.errors import SpecError
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.parameters import paths

T = 12
BATCH = build([[example(3, ("image", 4), 1, seed=1), example(3, seed=2)], [example(9, seed=3)]], T)
POST = {"norm_placement": "post", "scan": False, "depth": 4}


@pytest.fixture(scope="module")
def post():
    """(unrolled model of post-norm blocks, its parameters)"""
    return tiny_model(**POST)


@pytest.fixture(scope="module")
def by_hand(post):
    """Its logits, by the formula: norm(x + attention(x)), then norm(x + mlp(x)), and the head at once."""
    model, params = post

    def logits(params):
        module = model.module(params)
        x_BTD = module.embed(BATCH)[0]
        context = dataclasses.replace(module.decoder._context(BATCH, None)[0], inputs_BTD=x_BTD)
        for block in module.decoder.blocks:
            x_BTD = block.attention_norm(x_BTD + block.attention(x_BTD, context)[0])
            x_BTD = block.mlp_norm(x_BTD + block.mlp(x_BTD))
        return module.logits(x_BTD)

    return np.asarray(jax.jit(logits)(params))


def stacked(params):
    """The parameters as a scanned model holds them."""
    blocks = params["decoder"]["blocks"]
    return params | {"decoder": {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks.values())}}


@pytest.mark.parametrize(
    "fields", [{}, {"scan": True}, pytest.param({"scan": True, "remat": "full"}, marks=pytest.mark.slow)], ids=str
)
def test_a_branch_is_normalised_after_it_is_added_and_nothing_after_the_last_block(post, by_hand, fields):
    _, params = post
    model = bind(tiny(**POST | fields), VOCABULARY)
    own = stacked(params) if fields else params
    assert paths(model.abstract()).keys() == paths(own).keys()
    np.testing.assert_allclose(jax.jit(model.apply)(own, BATCH).logits_BTV, by_hand, rtol=0, atol=1e-5)
    assert np.ptp(by_hand[BATCH.segment_BT > 0], axis=0).min() > 0.5, "there is something to compare"


def test_stages_compute_the_same(post, by_hand):
    model = bind(tiny(**POST | {"scan": True}), VOCABULARY)

    def logits(params):
        module = model.module(params)
        x_BTD = module.embed(BATCH)[0]
        context = dataclasses.replace(module.decoder._context(BATCH, None)[0], inputs_BTD=x_BTD)
        return module.logits(module.decoder.in_stages(x_BTD, context, None, Schedule(2, 1, 2))[0])

    np.testing.assert_allclose(jax.jit(logits)(stacked(post[1])), by_hand, rtol=0, atol=1e-5)


def test_token_by_token_equals_the_whole_row(post, by_hand):
    model, params = post
    decode, prompt = jax.jit(model.decode), 8
    logits_BTV, cache = decode(params, columns(BATCH, 0, prompt, media=True), model.init_cache(2, T))
    steps = [logits_BTV]
    for t in range(prompt, T):
        logits_BTV, cache = decode(params, columns(BATCH, t, t + 1, media=False), cache)
        steps.append(logits_BTV)
    real_BT = BATCH.segment_BT > 0
    np.testing.assert_allclose(np.concatenate(steps, axis=1)[real_BT], by_hand[real_BT], rtol=0, atol=1e-5)


def test_no_position_sees_the_future_or_another_example(post):
    model, params = post
    decoder, row = model.module(params).decoder, jax.tree.map(lambda x: x[:1], BATCH)
    x_BTD = np.float32(np.random.default_rng(0).normal(size=(1, T, 16)))
    jacobian = jax.jit(jax.jacrev(lambda x_BTD: decoder(x_BTD, row)[0]))(x_BTD)  # [1, T, D, 1, T, D]
    seen_TT = np.abs(np.asarray(jacobian)).max(axis=(0, 2, 3, 5)) > 0
    t, s = np.indices((T, T))
    segment_T = row.segment_BT[0]
    np.testing.assert_array_equal(seen_TT[segment_T > 0], ((segment_T[:, None] == segment_T) & (s <= t))[segment_T > 0])


def test_gradients_of_empty_rows_are_finite():
    model = bind(tiny(**POST | {"adapters": {}}), VOCABULARY)
    empty = build([[]], T, adapters={})
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply(params, empty).logits_BTV)))(lively(model))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_towers_may_be_post_norm():
    model = bind(tiny(), VOCABULARY)
    adapters = {
        name: one.replace(tower=one.tower.replace(norm_placement="post")) for name, one in model.spec.adapters.items()
    }
    other = bind(tiny(adapters=adapters), VOCABULARY)
    params = lively(other)
    gone = paths(model.abstract()).keys() - paths(other.abstract()).keys()
    assert gone == {f"adapters/{name}/tower/norm/{part}" for name in adapters for part in ("scale", "bias")}
    logits_BTV = jax.jit(other.apply)(params, BATCH).logits_BTV
    assert np.isfinite(logits_BTV).all()


def test_the_last_norm_is_not_counted():
    pre, post = (describe(tiny(norm_placement=placement), VOCABULARY, T) for placement in ("pre", "post"))
    assert pre.parameters - post.parameters == 16
    assert pre.flops_per_token == post.flops_per_token, "norms are not counted"


def test_branches_of_post_norm_blocks_start_as_other_layers_do():
    pre, post = (tiny(depth=8, norm_placement=placement).decoder.dims("float32") for placement in ("pre", "post"))
    assert (pre.output_scale, post.output_scale) == (0.25, 1.0)


def test_another_placement_is_told():
    with pytest.raises(SpecError, match="norm_placement"):
        tiny(norm_placement="middle")
