"""Loss spikes: what counts as one, and that its update leaves no trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigram import Bigram, random_batch

from batches import traits_of
from polygpt.errors import Diverged, SpecError
from polygpt.objectives.loss import Loss
from polygpt.objectives.next_token import NextToken
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import WarmupLinear
from polygpt.training.spikes import Rewinds, Rewound, SpikeSpec
from polygpt.training.state import create
from polygpt.training.step import Recipe, make_step


def judged(spec, losses, norms=None):
    """For each step: (spike, spikes, in a row, entered)."""
    judge = jax.jit(spec.judge)
    window, found = spec.begin(), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        finite = jnp.isfinite(loss)
        spike, window = judge(window, jnp.float32(loss), jnp.float32(norm), finite)
        found.append((bool(spike), int(window.spikes), int(window.in_row), int(window.entered)))
    return found


def expected(losses, size, sigmas):
    """The definition in float64, step by step."""
    recent, spikes = [], []
    for loss in losses:
        spike = len(recent) >= size and loss > np.mean(recent[-size:]) + sigmas * np.std(recent[-size:])
        spikes.append(bool(spike))
        if not spike:
            recent.append(loss)
    return spikes


def test_a_spike_stands_out_from_the_window_and_does_not_enter_it():
    rng = np.random.default_rng(0)
    losses = 3 + 0.1 * rng.standard_normal(60) + 2.0 * (rng.random(60) < 0.15)
    found = [spike for spike, *_ in judged(SpikeSpec(window=8, sigmas=4.0), losses)]
    assert found == expected(losses, 8, 4.0)
    assert 3 <= sum(found) <= 12


def test_a_fall_is_no_spike_and_neither_is_what_is_not_finite():
    found = judged(SpikeSpec(window=4, sigmas=3.0), [2.0, 2.1, 2.0, 2.1, 0.5, np.nan, np.inf, 2.0])
    assert [spike for spike, *_ in found] == [False] * 8
    assert found[-1][3] == 6, "what is not finite does not enter the window"


def test_the_gradient_norm_counts_where_it_is_asked_for():
    losses, norms = [1.0, 1.1, 1.0, 1.1, 1.0], [5.0, 5.1, 5.0, 5.1, 50.0]
    spec = SpikeSpec(window=4)
    assert not judged(spec, losses, norms)[-1][0]
    assert judged(spec.replace(gradient_norm=True), losses, norms)[-1][0]


def test_a_level_that_has_shifted_becomes_the_new_one_where_updates_are_skipped():
    losses = [1.0, 1.1, 1.0, 1.1] + [9.0, 9.1, 9.0, 9.1, 9.0, 9.1, 9.0, 90.0]
    found = judged(SpikeSpec(window=4, patience=3), losses)
    assert [spike for spike, *_ in found[4:]] == [True, True, True, False, False, False, False, True]
    assert [row for _, _, row, _ in found[4:8]] == [1, 2, 3, 0]
    rewinding = judged(SpikeSpec(window=4, patience=3, action="rewind"), losses)
    assert all(spike for spike, *_ in rewinding[4:]), "whoever rewinds does not come to terms with it"


def prepare(spikes):
    model, optim = Bigram(), Optim(WarmupLinear(0.01, warmup=10), ema=0.9)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    made = optim.build(traits_of(shapes), 100)
    objectives = {"next_token": (NextToken(), 1.0)}
    rate, trainable = optim.schedule.build(100), optim.trainable(traits_of(shapes))
    recipe = Recipe(Loss(model, objectives, trainable), made, rate, ema=0.9, spikes=spikes)
    return create(model, made, 0, True, spikes), jax.jit(make_step(recipe))


def test_a_spiking_batch_changes_nothing_but_the_counts():
    state, step = prepare(SpikeSpec(window=4, sigmas=3.0))
    for _ in range(4):
        state, _ = step(state, random_batch())
    hard = dataclasses.replace(random_batch(), target_BT=np.zeros_like(random_batch().target_BT))
    limit = float(np.mean(state.window.recent) + 3 * np.std(state.window.recent))
    after, metrics = step(state, hard)
    assert metrics["loss"] > limit and metrics["spikes"] == metrics["spikes_in_row"] == metrics["skipped"] == 1
    assert metrics["skipped_in_row"] == 0, "it is finite"
    same = (state.params, state.opt_state, state.ema, state.window.recent)
    jax.tree.map(np.testing.assert_array_equal, same, (after.params, after.opt_state, after.ema, after.window.recent))
    later, metrics = step(after, random_batch())
    assert (int(later.step), int(later.skipped), metrics["spikes_in_row"]) == (6, 1, 0)
    np.testing.assert_allclose(metrics["learning_rate"], 0.01 * 5 / 10, rtol=1e-6)  # the fifth update, not the sixth


def test_looking_for_spikes_changes_no_step_without_one():
    plain, plain_step = prepare(None)
    looking, looking_step = prepare(SpikeSpec(window=2, sigmas=1e6))
    for seed in range(4):
        plain, _ = plain_step(plain, random_batch(seed=seed))
        looking, _ = looking_step(looking, random_batch(seed=seed))
    np.testing.assert_allclose(looking.params["head"]["kernel"], plain.params["head"]["kernel"], rtol=1e-6)
    assert plain.window is None


@pytest.mark.parametrize("field, value", [("window", 1), ("sigmas", 0.0), ("patience", 0), ("rewinds", -1)])
def test_settings_that_make_no_sense_are_refused(field, value):
    with pytest.raises(SpecError, match=f"SpikeSpec.{field} is"):
        SpikeSpec(**{field: value})


def test_rewinds_are_counted_with_the_spikes_that_they_undid_and_are_not_endless():
    rewinds = Rewinds(SpikeSpec(action="rewind", patience=2, rewinds=2), Rewound(times=1, spikes=3))
    metrics = {"spikes": 4.0, "spikes_in_row": 1.0}
    rewinds.observe(8, "after 8", metrics)
    assert not rewinds.due and metrics == {"spikes": 7.0, "spikes_in_row": 1.0, "rewinds": 1.0}
    rewinds.observe(9, "after 9", {"spikes": 5.0, "spikes_in_row": 2.0})
    assert rewinds.due and rewinds.begin() == (9, "after 9")
    rewinds.end(spikes=1)
    assert not rewinds.due and rewinds.totals == Rewound(times=2, spikes=3 + 4)
    rewinds.observe(12, "after 12", {"spikes": 3.0, "spikes_in_row": 2.0})
    with pytest.raises(Diverged, match="step 12: the loss spiked 2 times in a row, after 2 rewinds: "):
        rewinds.begin()


@pytest.mark.parametrize("spec", [None, SpikeSpec(action="skip", patience=1)])
def test_without_the_action_there_are_no_rewinds(spec):
    rewinds, metrics = Rewinds(spec), {"spikes": 2.0, "spikes_in_row": 2.0}
    rewinds.observe(3, None, metrics)
    assert not rewinds.due and metrics.get("rewinds", 0) == 0 and metrics["spikes"] == 2
