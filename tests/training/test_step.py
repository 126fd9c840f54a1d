"""The pure step: normalisation, accumulation, skipping, moving average, randomness."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigram import Bigram, random_batch

from batches import traits_of
from polygpt.objectives.forward import Forward
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.objectives.z_loss import ZLoss
from polygpt.optim.groups import Group
from polygpt.optim.optim import Optim
from polygpt.optim.optimizers import AdamW
from polygpt.optim.schedules import Constant, WarmupLinear
from polygpt.training.state import create
from polygpt.training.step import Recipe, make_step

OBJECTIVES = {"next_token": (NextToken(), 1.0), "z": (ZLoss(), 0.01)}


@functools.cache
def prepare(optim=Optim(Constant(0.01)), model=Bigram(), seed=0):  # noqa: B008
    """(initial state, compiled step): one program for all tests that ask for the same."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    transformation = optim.build(traits_of(params), 100)
    loss = Loss(model, OBJECTIVES, optim.trainable(traits_of(params)), optim.accumulate)
    recipe = Recipe(loss, transformation, optim.schedule.build(100), seed, optim.ema)
    return create(model, transformation, seed, optim.ema is not None), jax.jit(make_step(recipe))


def assert_trees_close(tree, other, rtol, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), tree, other)


def assert_trees_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_a_few_steps_lower_the_loss_and_count():
    state, step = prepare()
    losses = []
    for _ in range(20):
        state, metrics = step(state, random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 20 and int(state.skipped) == 0


def test_the_loss_is_the_weighted_sum_of_global_means():
    state, step = prepare()
    batch = random_batch()
    logits_BTV = np.asarray(Forward(Bigram(), state.params, batch).logits_BTV, np.float64)
    log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
    loss_BT = log_z_BT - np.take_along_axis(logits_BTV, batch.target_BT[..., None], -1)[..., 0]
    cross_entropy = (loss_BT * batch.weight_BT).sum() / batch.weight_BT.sum()
    z = (log_z_BT**2 * batch.weight_BT).sum() / batch.weight_BT.sum()
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss/next_token"], cross_entropy, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/z"], z, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], cross_entropy + 0.01 * z, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_whole_batch(accumulate):
    whole, whole_step = prepare(Optim(Constant(0.01)))
    parts, parts_step = prepare(Optim(Constant(0.01), accumulate=accumulate))
    for i in range(3):
        whole, whole_metrics = whole_step(whole, random_batch(seed=i))
        parts, parts_metrics = parts_step(parts, random_batch(seed=i))
        np.testing.assert_allclose(whole_metrics["loss"], parts_metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(whole_metrics["gradient_norm"], parts_metrics["gradient_norm"], rtol=1e-5)
    assert_trees_close(whole.params, parts.params, rtol=1e-5, atol=1e-5)


def test_a_batch_without_any_weight_gives_zero_and_finite_gradients():
    state, step = prepare(Optim(Constant(0.01), AdamW(weight_decay=0.0)))
    after, metrics = step(state, random_batch(weight=0.0))
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0 and after.skipped == 0
    assert_trees_equal(state.params, after.params)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(poison):
    state, step = prepare(Optim(Constant(0.01), ema=0.9))
    state, _ = step(state, random_batch())
    bad = random_batch(weight=poison)
    first, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"]) and metrics["skipped_in_row"] == 1
    second, _ = step(first, bad)
    assert (int(second.step), int(second.skipped), int(second.skipped_in_row)) == (3, 2, 2)
    assert_trees_equal((state.params, state.opt_state, state.ema), (second.params, second.opt_state, second.ema))
    third, _ = step(second, random_batch())
    assert (int(third.skipped), int(third.skipped_in_row)) == (2, 0)


def test_an_update_that_overflows_is_skipped_too():
    state, step = prepare(Optim(Constant(3e38), AdamW(weight_decay=1e9)))
    after, metrics = step(state, random_batch())
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["update_norm"]) and after.skipped == 1
    assert_trees_equal(state.params, after.params)


def test_the_moving_average_follows_its_formula():
    state, step = prepare(Optim(Constant(0.01), ema=0.5))
    average = state.params["hidden"]["kernel"]
    for i in range(12):
        state, _ = step(state, random_batch(seed=i))
        decay = min(0.5, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * state.params["hidden"]["kernel"]
    np.testing.assert_allclose(state.ema["hidden"]["kernel"], average, rtol=1e-5)
    assert state.eval_params is state.ema and prepare()[0].eval_params is not None


def test_frozen_parameters_stay_and_get_no_gradient():
    frozen = Optim(Constant(0.01), AdamW(weight_decay=0.5), groups=(Group("^(embedding|hidden)", freeze=True),))
    state, step = prepare(frozen)
    after, metrics = step(state, random_batch())
    assert_trees_equal(
        (state.params["embedding"], state.params["hidden"]), (after.params["embedding"], after.params["hidden"])
    )
    assert np.all(state.params["head"]["kernel"] != after.params["head"]["kernel"])
    head = {name: after.params[name] if name == "head" else state.params[name] for name in state.params}
    assert_trees_equal(head, after.params)
    _, full = prepare()[1](state_like(state), random_batch())
    assert metrics["gradient_norm"] < full["gradient_norm"]


def state_like(state):
    """The initial state of the default recipe has another optimizer state but the same parameters."""
    fresh, _ = prepare()
    assert_trees_equal(fresh.params, state.params)
    return fresh


def test_the_learning_rate_counts_updates_not_steps():
    state, step = prepare(Optim(WarmupLinear(1.0, warmup=10)))
    state, metrics = step(state, random_batch())
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)
    state, _ = step(state, random_batch(weight=np.nan))
    state, metrics = step(state, random_batch())
    np.testing.assert_allclose(metrics["learning_rate"], 0.2, rtol=1e-6)


def test_dropout_depends_on_seed_and_step_alone():
    model, batch = Bigram(dropout=0.5), random_batch()
    state, step = prepare(model=model)
    first, again = step(state, batch)[1], step(state, batch)[1]
    later = step(dataclasses.replace(state, step=jnp.int32(1)), batch)[1]
    _, other_step = prepare(model=model, seed=1)
    assert first["loss"] == again["loss"]
    assert len({float(first["loss"]), float(later["loss"]), float(other_step(state, batch)[1]["loss"])}) == 3
