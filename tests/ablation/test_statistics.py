"""Statistics of a few seeds, against SciPy, statsmodels and the truth that samples were drawn from."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from polygpt.ablation.intervals import interval_bootstrap, interval_bootstrap_unpaired, interval_t
from polygpt.ablation.statistics import (
    CORRECTION,
    compare,
    effect_range,
    effect_size,
    holm,
    one_sided,
    pooled_deviation,
    seeds_needed,
    seeds_range,
    skewed,
    skewness,
    superiority,
    t_statistic,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def coverage(low, high, truth=0.0):
    return np.mean((low <= truth) & (truth <= high))


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_t_interval_is_scipys(n, level):
    x = 3 + 0.1 * normal(n, seed=n)
    expected = stats.t.interval(level, n - 1, x.mean(), stats.sem(x))
    assert interval_t(x, level) == pytest.approx(expected, rel=1e-12)


def test_the_t_interval_of_five_seeds_covers_the_truth_as_often_as_it_says():
    low, high = interval_t(normal(5, 1000, seed=1))
    assert low.shape == high.shape == (1000,)
    assert 0.93 <= coverage(low, high) <= 0.97


@pytest.mark.parametrize("n", [pytest.param(4, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)])
def test_the_bootstrap_interval_of_a_few_seeds_covers_the_truth_as_often_as_it_says(n):
    assert 0.93 <= coverage(*interval_bootstrap(normal(n, 1000, seed=2))) <= 0.97


@pytest.mark.slow
def test_the_bootstrap_interval_of_five_skewed_seeds_covers_what_its_docstring_says():
    x = np.random.default_rng(3).exponential(size=(5, 4000))
    assert coverage(*interval_bootstrap(x), truth=1.0) == pytest.approx(0.932, abs=0.012)  # three standard errors
    assert coverage(*interval_t(x), truth=1.0) == pytest.approx(0.885, abs=0.015)


def test_the_unpaired_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    a, b = normal(5, 400, seed=4), 3 * normal(6, 400, seed=5)
    low, high = np.array([interval_bootstrap_unpaired(a[:, i], b[:, i]) for i in range(400)]).T
    assert coverage(low, high) == pytest.approx(0.95, abs=0.033)  # three standard errors


def test_the_bootstrap_interval_tends_to_the_t_interval():
    x = normal(400, seed=4)
    np.testing.assert_allclose(interval_bootstrap(x), interval_t(x), atol=0.01)  # of a width of 0.2


def test_the_bootstrap_is_that_of_all_resamples_there_are():
    x = normal(5, seed=5)
    every = np.array(list(itertools.product(x, repeat=5)))
    with np.errstate(divide="ignore"):
        t = (every.mean(axis=1) - x.mean()) / stats.sem(every, axis=1)
    low, high = np.quantile(t[~np.isnan(t)], [0.025, 0.975])
    expected = x.mean() - np.array([high, low]) * stats.sem(x)
    np.testing.assert_allclose(interval_bootstrap(x), expected, rtol=0.08)  # 10,000 of them are drawn


def test_the_unpaired_bootstrap_is_that_of_all_pairs_of_resamples():
    a, b = np.array([0.0, 1.0, 5.0, 1.5]), np.array([0.2, 0.3, 0.9])
    every, other = (np.array(list(itertools.product(x, repeat=len(x)))) for x in (a, b))

    def spread(x):
        return x.var(axis=-1, ddof=1) / x.shape[-1]

    off = (every.mean(axis=1) - a.mean())[:, None] - (other.mean(axis=1) - b.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        t = off / np.sqrt(spread(every)[:, None] + spread(other))
    error = math.sqrt(spread(a) + spread(b))
    low, high = np.quantile(t[np.isfinite(t)], [0.1, 0.9])
    expected = a.mean() - b.mean() - np.array([high, low]) * error
    np.testing.assert_allclose(interval_bootstrap_unpaired(a, b, level=0.8), expected, atol=0.06 * error)


def test_the_bootstrap_is_seeded():
    x = normal(6, seed=7)
    assert interval_bootstrap(x, seed=1) == interval_bootstrap(x, seed=1) != interval_bootstrap(x, seed=2)


@pytest.mark.parametrize("interval", [interval_t, interval_bootstrap])
def test_columns_are_samples_of_their_own(interval):
    x = normal(6, 2, 3, seed=8)
    low, high = interval(x)
    assert low.shape == (2, 3)
    assert (low[1, 2], high[1, 2]) == pytest.approx(interval(x[:, 1, 2]), rel=1e-12)


@pytest.mark.parametrize("interval", [interval_t, interval_bootstrap])
def test_intervals_of_samples_that_say_nothing_of_their_spread(interval):
    assert interval([]) == interval([3.0]) == interval([3.0, math.nan]) == (-math.inf, math.inf)
    assert interval([0.1] * 3) == pytest.approx((0.1, 0.1), abs=1e-15)
    assert interval([1.0, 2.0, math.nan, 4.0, 3.5]) == interval([1.0, 2.0, 4.0, 3.5])


def test_two_or_three_values_are_too_few_to_draw_from():
    assert interval_bootstrap([1.0, 2.0]) == interval_bootstrap([1.0, 2.0, 4.0]) == (-math.inf, math.inf)


# --- effects ----------------------------------------------------------------------------------------------------------


def students(d):
    return [stats.ttest_1samp(d, 0, alternative=side) for side in ("greater", "less")]


def halls(d):
    """p-values by Hall's transformation, written as a cube."""
    n, ratio, g = len(d), d.mean() / d.std(ddof=1), stats.skew(d, bias=False)
    moved = math.sqrt(n) * (((1 + g * ratio / 3) ** 3 - 1) / g + g / (6 * n))
    return stats.t.sf(moved, n - 1), stats.t.cdf(moved, n - 1)


def test_two_values_are_tested_by_scipys_t_test():
    d = 0.3 + normal(2, seed=2)
    greater, less = students(d)
    assert t_statistic(d) == pytest.approx(greater.statistic, rel=1e-12)
    assert one_sided(d) == pytest.approx((greater.pvalue, less.pvalue), rel=1e-9)


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("shift", [-1.0, 0.3])
def test_more_are_tested_by_students_and_halls_test_which_must_agree(n, shift):
    for d in shift + normal(10, n, seed=n):
        greater, less = students(d)
        assert t_statistic(d) == pytest.approx(greater.statistic, rel=1e-12)
        expected = np.maximum((greater.pvalue, less.pvalue), halls(d))
        assert one_sided(d) == pytest.approx(tuple(expected), rel=1e-9)


DRAWN = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "t3": lambda rng, shape: rng.standard_t(3, size=shape),
    "lognormal": lambda rng, shape: rng.lognormal(size=shape) - math.exp(0.5),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
}
"""Samples whose mean is 0."""


@pytest.mark.parametrize(
    ("drawn", "n", "covered", "tail", "thin"),
    [
        ("normal", 5, 0.950, 0.016, 0.016),
        ("normal", 20, 0.950, 0.022, 0.022),
        ("t3", 5, 0.961, 0.013, 0.013),
        ("t3", 20, 0.957, 0.020, 0.020),
        ("exponential", 5, 0.884, 0.003, 0.062),
        ("lognormal", 5, 0.824, 0.001, 0.098),
        ("lognormal", 10, 0.837, 0.001, 0.080),
        ("lognormal", 20, 0.866, 0.002, 0.066),
    ],
)
def test_a_false_claim_is_held_as_often_as_the_docstring_says(drawn, n, covered, tail, thin):
    """At 2.5 % per side; a skewed sample towards its tail, towards its thin side, and the same sample mirrored."""
    x = DRAWN[drawn](np.random.default_rng(n), (n, 20_000))
    assert coverage(*interval_t(x)) == pytest.approx(covered, abs=0.008)
    above, below = (np.mean(p <= 0.025) for p in one_sided(x))
    assert (above, below) == pytest.approx((tail, thin), abs=0.006)
    mirrored = tuple(np.mean(p <= 0.025) for p in one_sided(-x))
    assert mirrored == (below, above)
    assert max(above, below) <= 0.025 or drawn in ("exponential", "lognormal")
    student = np.mean(stats.t.cdf(t_statistic(x), n - 1) <= 0.025)
    assert below < student and (thin < 0.025 or below < 0.62 * student)


@pytest.mark.parametrize(("n", "rate"), [(5, 0.053), (20, 0.055)])
def test_skewness_is_reported_of_few_normal_samples_and_of_most_large_skewed_ones(n, rate):
    rng = np.random.default_rng(1)
    assert np.mean([skewed(d) is not None for d in rng.normal(size=(4000, n))]) == pytest.approx(rate, abs=0.011)
    found = [skewed(d) for d in rng.lognormal(size=(500, n))]
    assert np.mean([g is not None for g in found]) > (0.15 if n == 5 else 0.8)
    d = rng.lognormal(size=n) ** 3
    assert skewed(d) == pytest.approx(stats.skew(d, bias=False), rel=1e-12) and skewed(-d) == -skewed(d)


def test_no_skewness_is_seen_in_three_values_or_without_variance():
    assert skewed([1.0, 1.0, 9.0]) is None and skewed([]) is None and skewed([2.0] * 9) is None
    assert skewness([0.1 + 0.2, 0.3, 0.3]) == 0 and skewness([1.0, 2.0]) == 0
    np.testing.assert_allclose(skewness(normal(6, 4)), stats.skew(normal(6, 4), bias=False), rtol=1e-12)


def test_t_of_samples_that_say_nothing_of_their_spread():
    assert t_statistic([0.2] * 4) == math.inf and one_sided([0.2] * 4) == (0.0, 1.0)
    assert t_statistic([-0.1, 0.2 - 0.3, 0.5 - 0.6]) == -math.inf  # equal but for rounding
    assert t_statistic([0.0] * 4) == 0 and one_sided([0.0] * 4) == (1.0, 1.0)
    assert t_statistic([1.0]) == 0 and one_sided([1.0]) == one_sided([]) == (1.0, 1.0)


def test_the_effect_size_has_no_bias_where_the_plain_ratio_has():
    d = 0.8 + normal(20_000, 5, seed=9)
    plain = (d.mean(axis=1) / d.std(axis=1, ddof=1)).mean()
    corrected = np.mean([effect_size(row) for row in d])
    assert plain > 0.95
    assert corrected == pytest.approx(0.8, abs=0.015)  # three standard errors


def test_the_effect_size_by_hand():
    # Mean 2, standard deviation 1; J(2) = gamma(1) / (sqrt(1) gamma(1/2)) = 1 / sqrt(pi).
    assert effect_size([1.0, 2.0, 3.0]) == pytest.approx(2 / math.sqrt(math.pi), rel=1e-12)
    assert effect_size([1.0, 3.0]) == pytest.approx(math.sqrt(2), rel=1e-12)
    assert effect_size([1.0]) is None
    assert (effect_size([0.5, 0.5]), effect_size([-0.5] * 3), effect_size([0.0] * 3)) == (math.inf, -math.inf, 0.0)


@pytest.mark.parametrize(("t", "n"), [(0.0, 5), (2.0, 5), (-3.0, 5), (1.5, 2), (4.0, 20)])
def test_the_effect_range_makes_the_statistic_as_likely_as_it_says(t, n):
    rng = np.random.default_rng(2)
    low, high = effect_range(t, n)
    for effect, chance in ((low, 0.9), (high, 0.1)):
        drawn = t_statistic(effect + rng.normal(size=(n, 40_000)))
        assert np.mean(drawn <= t) == pytest.approx(chance, abs=0.006)


def test_the_effect_range_of_too_little_and_without_variance():
    assert effect_range(3.0, 1) is None and effect_range(math.inf, 4) == (math.inf, math.inf)


@pytest.mark.parametrize("ties", [False, True])
def test_superiority_is_scipys_u_over_the_pairs(ties):
    a, b = normal(7, seed=10), 0.5 + normal(9, seed=11)
    if ties:
        a, b = np.round(a), np.round(b)
    assert superiority(a, b) == pytest.approx(stats.mannwhitneyu(b, a).statistic / (7 * 9), rel=1e-12)


def test_superiority_of_all_of_none_and_of_equals():
    assert superiority([1, 2], [3, 4]) == 1.0
    assert superiority([3, 4], [1, 2]) == 0.0
    assert superiority([1, 1], [1, 1]) == 0.5
    assert superiority([], [1]) is None


def test_pooled_deviation():
    x, y = normal(5, 2, seed=12), 3 * normal(4, 1, seed=13)
    ranges = [x[:, 0], x[:, 1], y[:, 0]]
    expected = math.sqrt(sum(stats.tvar(r) * (len(r) - 1) for r in ranges) / (4 + 4 + 3))
    assert pooled_deviation([x, y]) == pytest.approx(expected, rel=1e-12)
    # A value that is missing leaves its seed in the other columns.
    y = np.append(y, [[math.nan]], axis=0)
    assert pooled_deviation([x, y]) == pytest.approx(expected, rel=1e-12)
    assert pooled_deviation([x[:1], y[:1]]) is None


def test_compare_is_the_paired_test_of_those_seeds_that_both_have():
    a, b = normal(6, seed=14), 0.7 + normal(6, seed=15)
    found = compare(np.append(a, [math.nan, 9.0]), np.append(b, [9.0, math.nan]))
    expected = stats.ttest_rel(a, b)
    assert found.seeds == 6
    assert found.mean == pytest.approx((a - b).mean(), rel=1e-12)
    assert found.p == pytest.approx(max(expected.pvalue, 2 * min(halls(a - b))), rel=1e-9)
    assert found.skewed is None
    assert found.t == pytest.approx(expected.confidence_interval(0.95), rel=1e-9)
    assert found.bootstrap == interval_bootstrap(a - b)
    assert found.effect == effect_size(a - b) < 0
    assert found.superiority == superiority(a, b) > 0.5


def test_compare_of_too_little():
    one, none = compare([1.0], [3.0]), compare([math.nan], [3.0])
    assert (one.mean, one.p, one.effect, one.superiority, one.seeds) == (-2.0, 1.0, None, 1.0, 1)
    assert (none.mean, none.p, none.effect, none.superiority, none.seeds) == (None, 1.0, None, None, 0)
    assert one.t == one.bootstrap == none.t == (-math.inf, math.inf)


# --- many claims, and how many seeds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_statsmodels(seed):
    p = np.random.default_rng(seed).beta(0.3, 2, size=1 + 3 * seed)
    p[: seed // 2] = p[-1]  # ties
    rejected, expected, _, _ = multipletests(p, alpha=0.05, method="holm")
    np.testing.assert_allclose(holm(p), expected, rtol=1e-12)
    np.testing.assert_array_equal(holm(p) <= 0.05, rejected)


def test_holm_of_none():
    assert holm([]).shape == (0,)


def power_of(effect, n, alpha):
    """statsmodels' power, which is NaN where the tail on the other side underflows: there it is that of one side."""
    both = TTestPower().power(effect, n, alpha)
    return TTestPower().power(effect, n, alpha / 2, alternative="larger") if math.isnan(both) else both


@pytest.mark.parametrize("power", [0.8, 0.95])
@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.05 / 12])
@pytest.mark.parametrize("effect", [0.05, 0.3, 0.8, 1.5, 4.0])
def test_seeds_needed_is_statsmodels(effect, alpha, power):
    found = seeds_needed(effect, alpha, power)
    assert seeds_needed(-effect, alpha, power) == found
    found -= CORRECTION if found > 2 else 0
    assert power_of(effect, found, alpha) >= power
    assert found == 2 or power_of(effect, found - 1, alpha) < power


@pytest.mark.parametrize(("effect", "alpha"), [(0.4, 0.05), (1.0, 0.05), (1.41, 0.0125), (3.0, 0.05)])
def test_that_many_seeds_find_the_effect_that_often_and_two_fewer_do_not(effect, alpha):
    found, rng = seeds_needed(effect, alpha), np.random.default_rng(3)
    power, less = (
        np.mean(2 * one_sided(rng.normal(effect, 1, (n, 20_000)))[0] <= alpha) for n in (found, found - CORRECTION)
    )
    assert less < 0.8 <= power + 0.01 and power < 0.92


def test_seeds_needed_where_no_number_would_do():
    assert seeds_needed(0.0) is None
    assert seeds_needed(0.02) is None
    by_t = math.ceil(TTestPower().solve_power(0.02, alpha=0.05, power=0.8))
    assert seeds_needed(0.02, most=20_000) == by_t + CORRECTION
    assert seeds_needed(0.8, most=14) is None
    assert seeds_needed(0.8, most=15) == 15 + CORRECTION


def test_seeds_needed_of_large_effects():
    # Where the distribution underflows, it must not be taken for an effect that is missed.
    assert seeds_needed(math.inf) == 2
    assert [seeds_needed(effect) for effect in (8.7, 30.0, 1e3, 1e6)] == [3 + CORRECTION, 2, 2, 2]


def test_the_range_of_seeds_is_that_of_the_effects():
    assert seeds_range([(0.5, 2.0)]) == (seeds_needed(2.0), seeds_needed(0.5))
    assert seeds_range([(0.5, 2.0), (0.4, 3.0)], 0.01) == tuple(seeds_needed(e, 0.01) for e in ((2.0, 3.0), (0.5, 0.4)))
    assert seeds_range([(-0.1, 2.0)]) == (seeds_needed(2.0), None)
    assert seeds_range([(-2.0, -0.1)]) is None and seeds_range([(-1.0, 0.001)]) is None


def test_seeds_needed_to_find_several_effects_at_once():
    effects, alphas = (0.9, 1.0, 3.0), (0.05, 0.02, 0.05)
    found = seeds_needed(effects, alphas)

    def missed(n):
        return sum(1 - power_of(effect, n, alpha) for effect, alpha in zip(effects, alphas, strict=True))

    assert missed(found - CORRECTION) <= 0.2 < missed(found - CORRECTION - 1)
    assert found > max(map(seeds_needed, effects, alphas))
