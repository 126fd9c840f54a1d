"""Claims about the variants of an ablation, tested over seeds.

A claim is a statement of `expressions.py`, made of comparisons of two means over seeds. Each comparison is tested in
both directions on the differences within seeds, by `statistics.one_sided`: Student's t test and its form without
skewness must agree. A claim of several comparisons follows the intersection-union principle (Berger 1982,
"Multiparameter hypothesis testing and acceptance sampling"): all of them hold with the largest p-value, at least one
holds with the smallest times their number (Bonferroni). So `abs(a - b) < noise` is Schuirmann's two one-sided tests
(1987). The opposite of "all hold" is that at least one does not. The smaller of the two p-values, doubled, is the
claim's, adjusted by Holm's method over all claims of the ablation.

**Assumption.** If the differences within seeds are normal, or symmetric, the probability that any false claim is held
or any true claim refuted is at most alpha. Skewed differences break this guarantee on one side: a few seeds often miss
the rare bad one. With alpha 0.05 and 5 seeds, a false claim alone is held in 6 % (exponential differences) to 10 %
(lognormal, sigma 1) of ablations instead of 2.5 %, by Student's test alone in 11 to 18 %; one of four such claims in
about 17 % instead of 5 %. A verdict whose own seeds look skewed says so in its note.

`noise` is treated as a known number, even if it is estimated. Estimated as the standard deviation over seeds it is too
small for a few seeds to hold `abs(a - b) < noise`: two equal variants with independent seeds pass in about 2 of 100
ablations of 5 seeds, and in 80 of 100 of 24. With `noise` given as three such deviations, 5 seeds pass in 4 of 5.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from polygpt.ablation.expressions import Comparison, Junction, Reader, Statement, parsed
from polygpt.ablation.intervals import interval_t
from polygpt.ablation.statistics import (
    effect_range,
    effect_size,
    holm,
    one_sided,
    pooled_deviation,
    seeds_needed,
    seeds_range,
    skewed,
    superiority,
    t_statistic,
)
from polygpt.spec import Spec

ROUNDING = 1e-13
"""Differences below this share of the largest value are rounding errors and count as 0."""

CAN_SHOW_SKEW = 4
"""The fewest seeds whose margins can look skewed."""


@dataclasses.dataclass(frozen=True)
class Claim(Spec):
    """A claim about variants."""

    text: str
    """An expression such as "swiglu < min(relu, gelu)"; ablation/expressions.py lists the forms. Equality, "abs(a - b)
    < noise", needs an ablation that sets `noise` if seeds are few: see the top of ablation/claims.py."""
    says: str = ""
    """The claim in words, and who makes it."""

    def validate(self):
        parsed(self.text)


@dataclasses.dataclass(frozen=True)
class Atom:
    """One comparison of a claim. The margin is its right side minus its left: positive where it holds.

    Attributes:
        text: "a < b".
        estimate: mean margin over seeds; None without seeds.
        low, high: 95 % t interval of the margin, not adjusted for the number of claims.
        t: Student's statistic; infinite without variance.
        p_holds, p_contrary: one-sided p-values; for steps at least the smallest of a sign test.
        effect: `effect_size` of the margins.
        superiority: P(left < right) + P(left = right) / 2 over all pairs of seeds.
        steps: whether margins are distances on a grid, or the same on all seeds.
        skewed: the skewness of the margins if it is notable; else None.
    """

    text: str
    estimate: float | None
    low: float
    high: float
    t: float
    p_holds: float
    p_contrary: float
    effect: float | None
    superiority: float | None
    steps: bool
    skewed: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the seeds say about a claim.

    Attributes:
        claim: the claim.
        verdict: held if the claim is significant, refuted if its opposite is.
        estimate, low, high, effect, superiority: those of the `Atom` that decides: the weakest comparison if all must
            hold, the strongest if one must.
        p: two-sided p-value.
        adjusted: p by Holm's method over all claims; the claim is decided if it is <= alpha.
        seeds_needed: number of seeds at which effects of the measured size decide the claim with probability 0.8,
            whatever becomes of the other claims; None if 10,000 are too few, or nothing is known yet.
        seeds_range: (fewest, most) for the 10 to 90 % range of what the effects may be, of an undecided claim; the
            second is None if they may be zero, the whole if `seeds_needed` is.
        atoms: all comparisons.
        seeds: number of seeds that have every run the claim is about.
        note: what one should know about the test, or "".
    """

    claim: Claim
    verdict: Literal["held", "refuted", "undecided"]
    estimate: float | None
    low: float
    high: float
    p: float
    adjusted: float
    effect: float | None
    superiority: float | None
    seeds_needed: int | None
    seeds_range: tuple[int, int | None] | None
    atoms: tuple[Atom, ...]
    seeds: int
    note: str = ""


Tested = Atom | Junction


def judge(
    values: Mapping[str, np.ndarray],
    axes: Mapping[str, Sequence],
    claims: Iterable[Claim],
    *,
    noise: float | None = None,
    better: Literal["lower", "higher"] = "lower",
    alpha: float = 0.05,
) -> list[Verdict]:
    """Verdicts on claims, in their order.

    Args:
        values: the metric by variant, [S, n_axis1, ...]; NaN for a missing run, whose seed is left out of the claims
            that need the run.
        axes: the values of each factor, in the order of the axes.
        claims: all claims of the ablation: the more there are, the stronger the evidence for each must be.
        noise: the smallest difference that counts; None for the standard deviation over seeds, pooled over all points.
        better: whether lower or higher metrics are better; only `best` in a claim depends on it.
        alpha: the probability that any verdict is wrong, under the assumption at the top of this file.

    Raises:
        SpecError: a claim cannot be read.
    """
    claims = list(claims)
    arrays = {name: np.asarray(array, np.float64) for name, array in values.items()}
    reader = Reader(arrays, axes, pooled_deviation(arrays.values()) if noise is None else noise, better)
    total = len(next(iter(arrays.values()), ()))
    rounding = ROUNDING * max((np.abs(x[np.isfinite(x)]).max(initial=0) for x in arrays.values()), default=0)
    tested = []
    for claim in claims:
        statement = reader.read(claim.text)
        comparisons = _leaves(statement)
        sides = np.array([_sides(comparison, total) for comparison in comparisons])  # [comparison, side, S]
        kept = np.isfinite(sides).all(axis=(0, 1))
        atoms = [_atom(c.text, *pair[:, kept], rounding) for c, pair in zip(comparisons, sides, strict=True)]
        tested.append((_with_leaves(statement, iter(atoms)), int(kept.sum())))
    p_values = [_p(tree) for tree, _ in tested]
    adjusted = holm([min(1.0, 2 * min(p)) for p in p_values])
    return [
        _verdict(claim, tree, p, float(a), (seeds, total), alpha, len(claims))
        for claim, (tree, seeds), p, a in zip(claims, tested, p_values, adjusted, strict=True)
    ]


def check(claims: Iterable[Claim], variants: Iterable[str], axes: Mapping[str, Sequence]) -> None:
    """Raises SpecError, before anything is run, if a claim does not fit these variants and factors."""
    shape = (2, *map(len, axes.values()))
    reader = Reader({name: np.ones(shape) for name in variants}, axes, noise=1.0)
    for claim in claims:
        reader.read(claim.text)


def _sides(comparison: Comparison, seeds: int) -> list[np.ndarray]:
    """Both sides as [S]."""
    return [np.broadcast_to(side.values.reshape(-1), seeds) for side in (comparison.left, comparison.right)]


def _atom(text: str, left_S: np.ndarray, right_S: np.ndarray, rounding: float) -> Atom:
    margin_S = right_S - left_S
    margin_S[np.abs(margin_S) <= rounding] = 0
    low, high = interval_t(margin_S)
    t, (p_holds, p_contrary) = t_statistic(margin_S), one_sided(margin_S)
    # The place of a minimum on a grid is often the same on all seeds. There a t test claims more certainty than it has,
    # without variance even complete certainty.
    steps = bool(margin_S.any()) and ("argmin(" in text or math.isinf(t))
    least = 0.5 ** len(margin_S) if steps else 0.0
    return Atom(
        text=text,
        estimate=float(margin_S.mean()) if len(margin_S) else None,
        low=low,
        high=high,
        t=float(t),
        p_holds=max(p_holds, least),
        p_contrary=max(p_contrary, least),
        effect=effect_size(margin_S),
        superiority=superiority(left_S, right_S),
        steps=steps,
        skewed=None if steps else skewed(margin_S),
    )


# --- statements made of several comparisons ---------------------------------------------------------------------------


def _leaves(tree: Statement | Tested) -> list:
    """The comparisons of a statement, or the atoms of a tested statement."""
    return [leaf for part in tree.parts for leaf in _leaves(part)] if isinstance(tree, Junction) else [tree]


def _with_leaves(tree: Statement, leaves: Iterator) -> Tested:
    """The tree with the next of `leaves` in place of each comparison."""
    if isinstance(tree, Junction):
        return Junction(tree.every, tuple(_with_leaves(part, leaves) for part in tree.parts))
    return next(leaves)


def _p(tree: Tested) -> tuple[float, float]:
    """p-values: (for the claim, for its opposite)."""
    if isinstance(tree, Atom):
        return tree.p_holds, tree.p_contrary
    holds, contrary = zip(*map(_p, tree.parts), strict=True)
    if tree.every:
        return max(holds), min(1.0, len(contrary) * min(contrary))
    return min(1.0, len(holds) * min(holds)), max(contrary)


def _deciding(tree: Tested) -> Atom:
    """The weakest comparison if all must hold, the strongest if one must."""
    if isinstance(tree, Atom):
        return tree
    return (min if tree.every else max)(map(_deciding, tree.parts), key=lambda atom: atom.t)


def _needed(tree: Tested, sign: int, alpha: float) -> list[tuple[float, float, float]]:
    """The effects that decide the claim: (size towards the verdict, its t statistic, level of its test).

    `sign` is 1 for held and -1 for refuted.
    """
    if isinstance(tree, Atom):
        return [(sign * (tree.effect or 0.0), sign * tree.t, alpha)]
    if tree.every == (sign > 0):
        return [one for part in tree.parts for one in _needed(part, sign, alpha)]
    parts = [_needed(part, sign, alpha / len(tree.parts)) for part in tree.parts]
    return max(parts, key=lambda some: min(effect for effect, *_ in some))


def _verdict(
    claim: Claim,
    tree: Tested,
    p: tuple[float, float],
    adjusted: float,
    seeds: tuple[int, int],
    alpha: float,
    claims: int,
) -> Verdict:
    holds = p[0] <= p[1]
    atom = _deciding(tree)
    effects, ts, levels = zip(*_needed(tree, 1 if holds else -1, alpha / claims), strict=True)
    used, total = seeds
    notes = []
    if used < 2:
        notes.append(f"{used} of {total} seeds can be compared: a test needs two")
    elif used < total:
        notes.append(f"{used} of {total} seeds: the others lack runs")
    needed = seeds_needed(effects, levels) if min(effects) > 0 else None
    span = needed and seeds_range([effect_range(t, used) for t in ts], levels) if adjusted > alpha else None
    leaves = _leaves(tree)
    if any(leaf.steps for leaf in leaves):
        least = math.ceil(math.log2(2 * claims / alpha))
        needed = needed and max(needed, least)
        span = span and (max(span[0], least), span[1] and max(span[1], least))
        notes.append(f"margins are steps, tested by their signs: a decision needs {least} seeds")
    elif used >= 2 and atom.low == atom.high:
        notes.append("the same on every seed")
    elif 2 <= used < CAN_SHOW_SKEW:
        notes.append(f"{used} seeds cannot show whether margins are skewed: p assumes that they are not")
    if skews := [leaf.skewed for leaf in leaves if leaf.skewed is not None]:
        notes.append(f"margins are skewed ({max(skews, key=abs):+.1f}): p is approximate, use more seeds")
    return Verdict(
        claim=claim,
        verdict="undecided" if adjusted > alpha else "held" if holds else "refuted",
        estimate=atom.estimate,
        low=atom.low,
        high=atom.high,
        p=min(1.0, 2 * min(p)),
        adjusted=adjusted,
        effect=atom.effect,
        superiority=atom.superiority,
        seeds_needed=needed,
        seeds_range=span,
        atoms=tuple(leaves),
        seeds=used,
        note="; ".join(notes),
    )
