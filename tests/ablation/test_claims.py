"""Verdicts on claims, where the truth is known."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from polygpt.ablation.claims import Claim, check, judge
from polygpt.ablation.intervals import interval_t
from polygpt.ablation.statistics import (
    CORRECTION,
    effect_range,
    effect_size,
    one_sided,
    pooled_deviation,
    seeds_needed,
    superiority,
    t_statistic,
)
from polygpt.errors import SpecError
from polygpt.spec import from_json, to_json


def sample(mean, deviation=0.01, seeds=5, seed=0):
    return mean + deviation * np.random.default_rng(seed).normal(size=seeds)


def one(text, values, axes=None, **options):
    (verdict,) = judge(values, axes or {}, [Claim(text)], **options)
    return verdict


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_comparison_is_the_paired_t_test():
    a, b = sample(3.0, seed=1), sample(3.02, seed=2)
    expected = stats.ttest_rel(b, a)
    for text in ("a < b", "b > a"):
        found = one(text, {"a": a, "b": b})
        assert found.p == found.adjusted == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.estimate == pytest.approx((b - a).mean(), rel=1e-12)
        assert (found.low, found.high) == pytest.approx(expected.confidence_interval(0.95), rel=1e-9)
        assert found.effect == pytest.approx(effect_size(b - a), rel=1e-9)
        assert found.superiority == superiority(a, b)
        assert (found.verdict, found.seeds, found.note) == ("held", 5, "")
    assert one("b < a", {"a": a, "b": b}).verdict == "refuted"
    assert one("b < a", {"a": a, "b": b}).estimate == pytest.approx((a - b).mean(), rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.2, -0.2])
def test_equivalence_is_two_one_sided_tests(shift):
    a, b = sample(3.0, seeds=9, seed=1), sample(3.0 + shift, seeds=9, seed=2)
    found = one("abs(a - b) < 0.05", {"a": a, "b": b})
    above, not_above = one_sided(a - b + 0.05)
    not_below, below = one_sided(a - b - 0.05)
    assert found.p == pytest.approx(min(1, 2 * min(max(above, below), 2 * min(not_above, not_below))), rel=1e-6)
    assert found.verdict == ("refuted" if abs(shift) > 0.1 else "held" if shift == 0 else "undecided")
    assert [atom.text for atom in found.atoms] == ["a - b < 0.05", "-(a - b) < 0.05"]


def test_a_claim_of_several_comparisons_is_as_strong_as_the_weakest():
    values = {"a": sample(3.0, seed=1), "b": sample(3.05, seed=2), "c": sample(3.055, seed=3)}
    chain, first, second = judge(values, {}, [Claim("a < b < c"), Claim("a < b"), Claim("b < c")])
    assert (first.verdict, second.verdict, chain.verdict) == ("held", "undecided", "undecided")
    assert chain.p == second.p
    figures = ("estimate", "low", "high", "effect", "superiority")
    assert [getattr(chain, name) for name in figures] == [getattr(second, name) for name in figures]
    # Refuted by any link, whose chance of error is doubled: there were two chances.
    values["c"] = sample(3.0, seed=4)
    chain, second = judge(values, {}, [Claim("a < b < c"), Claim("b < c")])
    assert (chain.verdict, second.verdict) == ("refuted", "refuted")
    assert chain.p == pytest.approx(2 * second.p, rel=1e-9)


def test_a_claim_of_any_of_several_comparisons_had_several_chances():
    values = {name: sample(m, seeds=9, seed=i) for i, (name, m) in enumerate([("a", 3.0), ("b", 3.1), ("c", 3.05)])}
    either, first, second = judge(values, {}, [Claim("min(a, b) < c"), Claim("a < c"), Claim("b < c")])
    assert (either.verdict, first.verdict, second.verdict) == ("held", "held", "refuted")
    assert either.p == pytest.approx(2 * first.p, rel=1e-9)
    assert either.estimate == first.estimate
    # Refuted where neither is true.
    neither, *each = judge(values, {}, [Claim("min(b, c) < a"), Claim("b < a"), Claim("c < a")])
    assert (neither.verdict, neither.p) == ("refuted", max(one.p for one in each))


def test_noise_is_the_pooled_deviation_unless_it_is_given():
    values = {"a": sample(3.0, 0.1, seed=1), "b": sample(3.0, 0.1, seed=2)}
    noise = pooled_deviation(values.values())
    assert one("a - b < noise", values) == one("a - b < noise", values, noise=noise)
    assert one("a - b < noise", values, noise=7.0).estimate == pytest.approx(7 - (values["a"] - values["b"]).mean())


def test_holm_is_over_all_claims():
    rng = np.random.default_rng(6)
    values = {name: rng.normal(3 + 0.01 * i, 0.01, 5) for i, name in enumerate("abcdef")}
    claims = [Claim(f"a < {name}") for name in "bcdef"]
    found = judge(values, {}, claims)
    _, expected, _, _ = multipletests([verdict.p for verdict in found], method="holm")
    assert [verdict.adjusted for verdict in found] == pytest.approx(list(expected), rel=1e-12)
    assert [verdict.claim for verdict in found] == claims
    alone = one("a < e", values)
    assert alone.verdict == "held" and found[3].verdict == "undecided"


def test_better_does_not_turn_comparisons_round():
    values, axes = {"a": np.arange(15.0).reshape(5, 3) ** 2, "b": np.zeros((5, 3))}, {"rate": (1, 2, 3)}
    lower, higher = (one("at(a, rate=3) > 5 + at(b, rate=3)", values, axes, better=b) for b in ("lower", "higher"))
    assert lower == higher
    lower, higher = (one("best(a, over=rate) > 0", values, axes, better=better) for better in ("lower", "higher"))
    assert lower.estimate == values["a"][:, 0].mean() and higher.estimate == values["a"][:, 2].mean()


# --- samples that say little ------------------------------------------------------------------------------------------


def test_a_seed_that_lacks_a_run_is_left_out_of_the_claims_about_that_run():
    rng = np.random.default_rng(6)
    values = {"a": rng.normal(3, 0.01, (5, 2)), "b": rng.normal(3.1, 0.01, (5, 2))}
    values["a"][3, 0] = np.nan
    claims = [Claim(f"at(a, width={width}) < at(b, width={width})") for width in (64, 128)]
    gap, whole = judge(values, {"width": (64, 128)}, claims)
    kept = [0, 1, 2, 4]
    assert (gap.low, gap.high) == interval_t((values["b"] - values["a"])[kept, 0])
    assert gap.seeds == 4 and gap.note.startswith("4 of 5 seeds: the others lack runs")
    assert whole.seeds == 5 and "seeds:" not in whole.note
    # Of a claim of several comparisons, all are about the same seeds.
    (both,) = judge(values, {"width": (64, 128)}, [Claim(" and ".join(claim.text for claim in claims))])
    assert both.atoms[1].low == interval_t((values["b"] - values["a"])[kept, 1])[0]


@pytest.mark.parametrize("text", ["a < b", "abs(a - b) < noise", "a < b and min(a, b) < 9"])
@pytest.mark.parametrize("seeds", [0, 1])
def test_fewer_than_two_seeds_decide_nothing(text, seeds):
    values = {"a": np.array([3.0, np.nan, 3.0]), "b": np.array([5.0, 5.0, np.nan])}
    if not seeds:
        values["a"][0] = np.inf
    found = one(text, values, noise=1.0)
    assert (found.verdict, found.p, found.adjusted, found.seeds_needed) == ("undecided", 1.0, 1.0, None)
    assert (found.low, found.high, found.effect) == (-math.inf, math.inf, None)
    assert found.note == f"{seeds} of 3 seeds can be compared: a test needs two"
    assert (found.estimate is None) == (seeds == 0)


def test_one_seed_without_a_noise_that_is_given():
    found = one("abs(a - b) < noise", {"a": np.array([3.0]), "b": np.array([3.0])})
    assert (found.verdict, found.estimate, found.note) == (
        "undecided",
        None,
        "0 of 1 seeds can be compared: a test needs two",
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seeds", [5, 6])
@pytest.mark.parametrize("text, verdict, low", [("a < b", "held", 0.1), ("b < a", "refuted", -0.1)])
def test_margins_without_variance_are_tested_as_signs(text, verdict, low, seeds):
    a = sample(3.0, seeds=seeds)
    found = one(text, {"a": a, "b": a + 0.1})
    assert (found.verdict, found.p) == ("undecided" if seeds == 5 else verdict, 2 * 0.5**seeds)
    assert (found.low, found.high) == pytest.approx((low, low), abs=1e-12)
    assert found.seeds_needed == (6 if seeds == 5 else None) or found.verdict != "undecided"
    assert found.note == "margins are steps, tested by their signs: a decision needs 6 seeds"


def test_samples_that_differ_by_rounding_are_the_same():
    a = sample(3.0)
    c = a * 0.1 * 10
    assert (a != c).any()
    found = one("a < c", {"a": a, "c": c})
    assert (found.verdict, found.p, found.low, found.high) == ("undecided", 1.0, 0.0, 0.0)
    assert found.note == "the same on every seed"


def test_the_best_rate_is_constant_over_width():
    rates, widths = np.arange(5), np.arange(3)
    axes = {"width": (64, 128, 256), "rate": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
    rng = np.random.default_rng(7)
    mup, standard = (
        (rates - 2 + drift * widths[:, None]) ** 2 + rng.normal(0, 0.01, (7, 3, 5)) for drift in (0.0, 1.0)
    )
    claims = [Claim(f"constant(argmin({name}, over=rate), over=width)") for name in ("mup", "standard")]
    held, refuted = judge({"mup": mup, "standard": standard}, axes, claims)
    assert (held.verdict, held.estimate) == ("held", 1.5)
    assert (refuted.verdict, refuted.estimate) == ("refuted", -0.5)
    for verdict in judge({"mup": mup[:6], "standard": standard[:6]}, axes, claims):
        assert verdict.verdict == "undecided" and "needs 7 seeds" in verdict.note


STEPS = [((1.0, -1.0), (0.5, 0.5)), ((1.0, -4.0), (0.8, 0.2)), ((2.0, 1.0, 0.0, -3.0), (0.2, 0.3, 0.2, 0.3))]


@pytest.mark.parametrize(
    ("steps", "chances", "seeds"),
    [
        pytest.param(*made, seeds, marks=[] if (i, seeds) in ((0, 5), (1, 8), (2, 2)) else pytest.mark.slow)
        for i, made in enumerate(STEPS)
        for seeds in (2, 5, 8)
    ],
)
def test_false_claims_of_where_it_is_lowest_are_seldom_held(steps, chances, seeds):
    """Margins whose mean is 0: at most 5 % of 500 ablations hold them, unless a rare step hides from few seeds."""
    rng = np.random.default_rng(12)
    draws = 4 + rng.choice(steps, p=chances, size=(500, seeds))
    a, b = np.abs(np.arange(9) - 4.0), np.abs(np.arange(9) - draws[..., None])  # of 9 rates, [ablation, S, rate]
    text, axes = "argmin(a, over=rate) < argmin(b, over=rate)", {"rate": range(9)}
    held = sum(one(text, {"a": np.tile(a, (seeds, 1)), "b": b}, axes).verdict == "held" for b in b) / 500
    unseen = (1 - chances[-1]) ** seeds if seeds > 5 else 0.0  # of so many seeds none has the rare one
    assert held <= max(0.05, 1.3 * unseen)


def test_margins_that_look_skewed_are_noted_and_few_seeds_cannot_look_so():
    a, b = np.zeros(6), np.array([1.0, 1.1, 0.9, 1.05, 0.95, 9.0])
    found = one("a < b", {"a": a, "b": b})
    skew = stats.skew(b, bias=False)
    assert found.atoms[0].skewed == pytest.approx(skew) and f"skewed ({skew:+.1f})" in found.note
    assert one("a < b", {"a": a[:5], "b": b[:5]}).note == ""
    assert "3 seeds cannot show whether margins are skewed" in one("a < b", {"a": a[:3], "b": b[:3]}).note


@pytest.mark.parametrize("side, held", [(1, 0.19), (-1, 0.002)])
def test_some_of_four_false_claims_of_skewed_seeds_is_held_as_often_as_it_says(side, held):
    """Lognormal differences of mean 0, five seeds, all claims towards the thin side, then all towards the tail."""
    x = side * (np.random.default_rng(4).lognormal(size=(5, 4, 20_000)) - math.exp(0.5))
    p = 2 * one_sided(x)[1].min(axis=0)  # by Holm's method the smallest of four is multiplied by four
    assert np.mean(4 * p <= 0.05) == pytest.approx(held, abs=0.012)


# --- errors made over many ablations ----------------------------------------------------------------------------------

AT = "at({}, length=128, rate=1)".format
FALSE = (
    f"{AT('equal')} < {AT('base')}",
    f"abs({AT('shifted')} - {AT('base')}) < noise",
    f"min({AT('equal')}, {AT('third')}) < {AT('base')}",
    f"{AT('base')} < {AT('third')} < {AT('worse')}",
    "flat(at(rising, rate=2), over=length)",
    "best(at(equal, length=256), over=rate) < best(at(third, length=256), over=rate)",
)
"""Each at the border of what would be true; the contrary is not true either."""
TRUE = f"{AT('base')} < {AT('worse')}"


@pytest.mark.slow
def test_false_claims_are_held_in_at_most_five_ablations_of_a_hundred():
    rng = np.random.default_rng(8)
    claims = list(map(Claim, (*FALSE, TRUE)))
    held, decided, power, ablations = 0, 0, 0, 600
    for _ in range(ablations):
        common = rng.normal(0, 0.01, (7, 1, 1))  # what a seed does to all variants

        def variant(mean, rise=0.0, common=common):
            return mean + rise * np.arange(2)[:, None] + common + rng.normal(0, 0.01, (7, 2, 3))

        means = {"base": 3.0, "equal": 3.0, "third": 3.0, "shifted": 3.02, "worse": 3.1}
        values = {**{name: variant(mean) for name, mean in means.items()}, "rising": variant(3.0, 0.02)}
        verdicts = [v.verdict for v in judge(values, {"length": (128, 256), "rate": (1, 2, 3)}, claims, noise=0.02)]
        held += "held" in verdicts[: len(FALSE)]
        decided += set(verdicts[: len(FALSE)]) != {"undecided"}
        power += verdicts[-1] == "held"
    assert held / ablations <= 0.05
    assert decided / ablations <= 0.05  # held or refuted, where neither is true
    assert held > 0 and power / ablations > 0.95


@pytest.mark.parametrize("seeds, noise, expected", [(5, 1.0, 0.015), (24, 1.0, 0.8), (5, 3.0, 0.49), (8, 3.0, 0.88)])
def test_few_seeds_show_equality_only_to_within_several_deviations(seeds, noise, expected):
    rng = np.random.default_rng(10)
    difference = rng.normal(size=(seeds, 20_000)) - rng.normal(size=(seeds, 20_000))
    p = np.maximum(one_sided(noise - difference)[0], one_sided(noise + difference)[0])
    assert np.mean(2 * p <= 0.05) == pytest.approx(expected, abs=0.015)
    found = one("abs(a - b) < noise", {"a": difference[:, 0], "b": np.zeros(seeds)}, noise=noise)
    assert found.verdict == ("held" if 2 * p[0] <= 0.05 else "undecided")


@pytest.mark.parametrize("effect, seeds", [(1.0, 5), (2.0, 5), (1.0, 20)])
def test_a_true_claim_is_held_a_little_less_often_than_by_students_test_alone(effect, seeds):
    rng, draws = np.random.default_rng(9), 300
    pairs = ((rng.normal(0, 1, seeds), rng.normal(effect, 1, seeds)) for _ in range(draws))
    held = sum(one("a < b", {"a": a, "b": b}).verdict == "held" for a, b in pairs) / draws
    by_t = TTestPower().power(effect / math.sqrt(2), seeds, 0.05)
    least = TTestPower().power(effect / math.sqrt(2), seeds - CORRECTION, 0.05)
    error = 3 * math.sqrt(by_t * (1 - by_t) / draws)
    assert least - error <= held <= by_t + error


# --- seeds needed -----------------------------------------------------------------------------------------------------


def test_seeds_needed_are_those_of_the_test_at_the_level_of_all_claims():
    values = {"a": sample(3.0, seed=1), "b": sample(3.004, seed=2), "c": sample(3.0, seed=3)}
    first, _ = judge(values, {}, [Claim("a < b"), Claim("a < c")])
    margins = values["b"] - values["a"]
    needed = TTestPower().solve_power(abs(effect_size(margins)), alpha=0.025, power=0.8)
    assert first.verdict == "undecided" and first.seeds_needed == math.ceil(needed) + CORRECTION
    low, high = effect_range(abs(t_statistic(margins)), 5)
    assert first.seeds_range == (seeds_needed(high, 0.025), seeds_needed(low, 0.025) if low > 0 else None)
    assert first.seeds_range[0] < first.seeds_needed


def test_seeds_needed_for_equivalence_find_both_sides():
    values = {"a": sample(3.0, 0.05, 10, seed=1), "b": sample(3.0, 0.05, 10, seed=2)}
    found = one("abs(a - b) < 0.03", values)
    effects = [atom.effect for atom in found.atoms]

    def missed(n):
        return sum(1 - TTestPower().power(effect, n, 0.05) for effect in effects)

    assert min(effects) > 0 and found.verdict == "undecided"
    by_t = found.seeds_needed - CORRECTION
    assert missed(by_t) <= 0.2 < missed(by_t - 1)


def test_seeds_needed_to_refute_a_chain_are_those_of_its_worst_link():
    values = {"a": sample(3.0, seed=1), "b": sample(3.01, seed=2), "c": sample(2.99, seed=3)}
    found = one("a < b < c", values)
    needed = TTestPower().solve_power(abs(effect_size(values["c"] - values["b"])), alpha=0.025, power=0.8)
    assert found.seeds_needed == math.ceil(needed) + CORRECTION


def test_no_number_of_seeds_decides_what_is_equal():
    assert one("a < b", {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([2.0, 1.0, 3.0])}).seeds_needed is None


# --- specifications ---------------------------------------------------------------------------------------------------


def test_a_claim_travels_as_json_and_is_an_expression():
    claim = Claim("a < b", "the paper, Table 1")
    assert from_json(to_json(claim)) == claim
    with pytest.raises(SpecError, match="claim 'a <': invalid syntax"):
        Claim("a <")


def test_check_reads_claims_before_there_are_results():
    axes = {"width": (64, 128)}
    check([Claim("at(a, width=64) / at(b, width=64) < 1")], ["a", "b"], axes)
    with pytest.raises(SpecError, match="claim 'a < c': no variant is named 'c'"):
        check([Claim("a < c")], ["a", "b"], axes)
    with pytest.raises(SpecError, match="claim 'a < b': a has a value for each width"):
        check([Claim("a < b")], ["a", "b"], axes)


def test_no_claims_no_verdicts():
    assert judge({"a": sample(3.0)}, {}, []) == []
