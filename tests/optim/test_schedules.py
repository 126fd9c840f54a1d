"""Schedules against their formulas, step by step."""

import math

import jax
import numpy as np
import pytest

from polygpt.errors import SpecError
from polygpt.optim.schedules import SGDR, WSD, Constant, WarmupCosine, WarmupExponential, WarmupLinear, extended

STEPS, WARMUP, PEAK = 50, 10, 0.3
REST = STEPS - WARMUP


def rates(schedule, steps=STEPS):
    build = schedule.build(steps)
    return np.array([build(t) for t in range(steps)])


def expected(formula):
    return [PEAK * (t + 1) / WARMUP if t < WARMUP else PEAK * formula(t - WARMUP) for t in range(STEPS)]


@pytest.mark.parametrize(
    "schedule, formula",
    [
        (Constant(PEAK, WARMUP), lambda t: 1),
        (WarmupCosine(PEAK, WARMUP, final=0.1), lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / REST)) / 2),
        (WarmupLinear(PEAK, WARMUP, final=0.2), lambda t: 1 - 0.8 * t / REST),
        (WarmupExponential(PEAK, WARMUP, final=0.01), lambda t: 0.01 ** (t / REST)),
        (WSD(PEAK, WARMUP, final=0, decay=0.4), lambda t: 1 if t < 20 else 1 - (t - 20) / 20),
        (
            WSD(PEAK, WARMUP, final=0.1, decay=0.4, shape="sqrt"),
            lambda t: 1 if t < 20 else 0.1 + 0.9 * (1 - math.sqrt((t - 20) / 20)),
        ),
    ],
    ids=lambda value: type(value).__name__ if not callable(value) else "",
)
def test_schedules_follow_their_formulas(schedule, formula):
    np.testing.assert_allclose(rates(schedule), expected(formula), rtol=2e-6, atol=1e-8)


def test_a_decay_that_the_warm_up_shortens_still_reaches_the_end():
    got = rates(WSD(PEAK, warmup=100, final=0, decay=1), steps=200)
    np.testing.assert_allclose(got[100:], PEAK * (1 - np.arange(100) / 100), rtol=2e-6)


@pytest.mark.parametrize("rewarm", [None, 1, 4, 1000])
def test_steps_after_a_schedule_keep_its_last_rate_or_go_to_the_longer_one(rewarm):
    """Before: the schedule as it was, to the bit."""
    schedule = WarmupLinear(PEAK, WARMUP, final=0.2)
    got, before = jax.vmap(extended(schedule, 30, STEPS, rewarm))(np.arange(STEPS)), schedule.build(30)
    np.testing.assert_array_equal(got[:30], jax.vmap(before)(np.arange(30)))
    last, whole = PEAK * (1 - 0.8 * 19 / 20), np.array([PEAK * (1 - 0.8 * t / REST) for t in range(20, 40)])
    share = 0 if rewarm is None else np.minimum(np.arange(1, 21) / rewarm, 1)
    np.testing.assert_allclose(got[30:], last + share * (whole - last), rtol=2e-6)


def test_warm_restarts_begin_each_cycle_at_its_peak():
    got = rates(SGDR(PEAK, final=0.1, period=5, stretch=2, shrink=0.5), steps=36)
    want = []
    for cycle, length in enumerate([5, 10, 20, 1]):
        low, high = PEAK * 0.1, PEAK * 0.5**cycle
        want += [low + (high - low) * (1 + math.cos(math.pi * t / length)) / 2 for t in range(length)]
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_cycles_of_one_step_stay_at_their_peaks():
    got = rates(SGDR(PEAK, period=1, stretch=1, shrink=0.5), steps=6)
    np.testing.assert_allclose(got, PEAK * 0.5 ** np.arange(6), rtol=2e-6)


def test_warm_restarts_of_equal_length():
    got = rates(SGDR(PEAK, WARMUP, period=4, stretch=1))
    np.testing.assert_allclose(got[WARMUP::4], PEAK, rtol=1e-6)
    np.testing.assert_allclose(got[WARMUP + 2 :: 4], PEAK / 2, rtol=1e-6)


@pytest.mark.parametrize("schedule", [WarmupCosine(PEAK, 100), WSD(PEAK, 100), SGDR(PEAK, 100)])
def test_a_run_shorter_than_its_warm_up_only_rises(schedule):
    np.testing.assert_allclose(rates(schedule, steps=20), PEAK * np.arange(1, 21) / 100, rtol=1e-6)


@pytest.mark.parametrize("schedule", [WarmupCosine(PEAK, WARMUP), WSD(PEAK, WARMUP), SGDR(PEAK, WARMUP, period=7)])
def test_schedules_compile_and_stay_finite_beyond_the_end(schedule):
    build = schedule.build(STEPS)
    compiled = jax.jit(build)
    np.testing.assert_allclose([compiled(t) for t in (0, 9, 10, 49)], [build(t) for t in (0, 9, 10, 49)], rtol=1e-6)
    assert np.isfinite(compiled(10 * STEPS)) and compiled(10 * STEPS) <= PEAK


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WarmupCosine(-1.0), "peak_lr is -1.0"),
        (lambda: WarmupCosine(1.0, final=2.0), "final is 2.0"),
        (lambda: WarmupExponential(1.0, final=0.0), "final is 0.0"),
        (lambda: WSD(1.0, decay=0.0), "decay is 0.0"),
        (lambda: WSD(1.0, final=-0.1), "final is -0.1"),
        (lambda: SGDR(1.0, final=-0.1), "final is -0.1"),
        (lambda: SGDR(1.0, final=1.1), "final is 1.1"),
        (lambda: SGDR(1.0, period=0), "period is 0"),
        (lambda: SGDR(1.0, stretch=0.9), "stretch is 0.9"),
        (lambda: SGDR(1.0, shrink=0.0), "shrink is 0.0"),
        (lambda: SGDR(1.0, shrink=1.1), "shrink is 1.1"),
    ],
)
def test_values_outside_their_range_are_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize("final", [0, 1])
def test_a_decay_may_end_at_zero_or_at_the_peak(final):
    for schedule in (WarmupCosine(1.0, final=final), WSD(1.0, final=final, decay=1.0), SGDR(1.0, final=final)):
        np.testing.assert_allclose(schedule.build(1000)(999), final, atol=3e-3)
