"""Claims about the variants of an ablation, tested over seeds.

A claim is a statement of `expressions.py`, made of comparisons of two means over seeds. Each comparison is tested by
Student's t test on the differences within seeds, both ways: a p-value of that it holds, and one of that the contrary
does. Claims of several comparisons follow the intersection-union principle (Berger 1982, "Multiparameter hypothesis
testing and acceptance sampling"): all of them hold with the largest p-value; at least one does with the smallest,
times their number (Bonferroni). So `abs(a - b) < noise` is Schuirmann's two one-sided tests (1987). The contrary of
all is at least one contrary. The smaller of the two, doubled, is the claim's p-value, adjusted by Holm's method over
all claims of the ablation: the chance that any claim is held that is false, or refuted that is true, is at most alpha.

`noise` is taken for a known number, though it may be estimated. As the standard deviation over seeds it is too small
for `abs(a - b) < noise` to be held of a few seeds: of two variants that are equal, and whose seeds have nothing in
common, it is held in about 3 of 100 ablations of 5 seeds, and in 80 of those of 23. Of a `noise` of three such
deviations, given as a number, 5 seeds hold it in 9 of 10.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from polygpt.ablation.expressions import Comparison, Junction, Reader, Statement, parsed
from polygpt.ablation.statistics import (
    effect_size,
    holm,
    interval_t,
    one_sided,
    pooled_deviation,
    seeds_needed,
    superiority,
    t_statistic,
)
from polygpt.spec import Spec

ROUNDING = 1e-13
"""Differences below this share of the largest value are what is left of rounding, and count as 0."""


@dataclasses.dataclass(frozen=True)
class Claim(Spec):
    """What is claimed of variants."""

    text: str
    """As an expression: "swiglu < min(relu, gelu)"; ablation/expressions.py lists its forms. Of equality, "abs(a - b) <
    noise", few seeds bear out only with a `noise` that the ablation gives: see the head of this file."""
    says: str = ""
    """In words, and who says it."""

    def validate(self):
        parsed(self.text)


@dataclasses.dataclass(frozen=True)
class Atom:
    """One comparison of a claim. The margin is its right side minus its left: positive where it holds.

    Attributes:
        text: "a < b".
        estimate: the mean margin over seeds; None without seeds.
        low, high: 95 % t interval of the margin, not adjusted for the number of claims.
        t: Student's statistic; infinite without variance.
        p_holds, p_contrary: one-sided; of steps not below the smallest that a sign test can have.
        effect: `effect_size` of the margins.
        superiority: P(left < right) + P(left = right) / 2 over all pairs of seeds.
        steps: whether margins are between places on a grid, or the same on all seeds.
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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What seeds say of a claim.

    Attributes:
        claim: the claim.
        verdict: held where it is significant that it holds, refuted where it is that the contrary does.
        estimate, low, high, effect, superiority: as in the `Atom` that decides: of comparisons that must all hold the
            weakest, of those of which one must the strongest.
        p: two-sided.
        adjusted: p by Holm's method over all claims; decided where it is <= alpha.
        seeds_needed: at which effects of the size measured would decide the claim with a chance of 0.8, whatever
            becomes of the other claims; None if not even 10,000 seeds would do, or nothing is known yet.
        atoms: all comparisons.
        seeds: that have all runs the claim is about, and are used.
        note: what is to be known about the test, or "".
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
        values: the metric by variant, [S, n_axis1, ...]; NaN where a run is missing, by which its seed is left out of
            the claims that need the run.
        axes: the values of each factor, in the order of the axes.
        claims: all that the ablation makes: the more there are, the stronger each must be.
        noise: the smallest difference that counts; None for the standard deviation over seeds, pooled over all points.
        better: whether lower or higher metrics are better; comparisons are of the numbers, whichever it is.
        alpha: the chance that any verdict is wrong.

    Raises:
        SpecError: for a claim that cannot be read.
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
    """Raises SpecError for a claim that could not be read of these variants and factors, before anything is run."""
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
    p_holds, p_contrary = one_sided(margin_S)
    # Where something is lowest is a place on a grid, often the same on all seeds: of steps Student's t is surer than it
    # may be, without variance even certain.
    steps = bool(margin_S.any()) and ("argmin(" in text or math.isinf(t_statistic(margin_S)))
    least = 0.5 ** len(margin_S) if steps else 0.0
    return Atom(
        text=text,
        estimate=float(margin_S.mean()) if len(margin_S) else None,
        low=low,
        high=high,
        t=t_statistic(margin_S),
        p_holds=max(p_holds, least),
        p_contrary=max(p_contrary, least),
        effect=effect_size(margin_S),
        superiority=superiority(left_S, right_S),
        steps=steps,
    )


# --- statements made of several comparisons ---------------------------------------------------------------------------


def _leaves(tree: Statement | Tested) -> list:
    """The comparisons of a statement, or the atoms of a tested one."""
    return [leaf for part in tree.parts for leaf in _leaves(part)] if isinstance(tree, Junction) else [tree]


def _with_leaves(tree: Statement, leaves: Iterator) -> Tested:
    """The tree with the next of `leaves` in place of each comparison."""
    if isinstance(tree, Junction):
        return Junction(tree.every, tuple(_with_leaves(part, leaves) for part in tree.parts))
    return next(leaves)


def _p(tree: Tested) -> tuple[float, float]:
    """p-values: (that it holds, that the contrary does)."""
    if isinstance(tree, Atom):
        return tree.p_holds, tree.p_contrary
    holds, contrary = zip(*map(_p, tree.parts), strict=True)
    if tree.every:
        return max(holds), min(1.0, len(contrary) * min(contrary))
    return min(1.0, len(holds) * min(holds)), max(contrary)


def _deciding(tree: Tested) -> Atom:
    """The weakest comparison of those that must all hold, the strongest of those of which one must."""
    if isinstance(tree, Atom):
        return tree
    return (min if tree.every else max)(map(_deciding, tree.parts), key=lambda atom: atom.t)


def _needed(tree: Tested, sign: int, alpha: float) -> list[tuple[float, float]]:
    """The effects that decide it, (towards the verdict, at which level); `sign` is 1 for held and -1 for refuted."""
    if isinstance(tree, Atom):
        return [(sign * (tree.effect or 0.0), alpha)]
    if tree.every == (sign > 0):
        return [pair for part in tree.parts for pair in _needed(part, sign, alpha)]
    parts = [_needed(part, sign, alpha / len(tree.parts)) for part in tree.parts]
    return max(parts, key=lambda pairs: min(effect for effect, _ in pairs))


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
    effects, levels = zip(*_needed(tree, 1 if holds else -1, alpha / claims), strict=True)
    used, total = seeds
    notes = []
    if used < 2:
        notes.append(f"{used} of {total} seeds can be compared: a test takes two")
    elif used < total:
        notes.append(f"{used} of {total} seeds: the others lack runs")
    needed = seeds_needed(effects, levels) if min(effects) > 0 else None
    if any(leaf.steps for leaf in _leaves(tree)):
        least = math.ceil(math.log2(2 * claims / alpha))
        needed = needed and max(needed, least)
        notes.append(f"margins are steps, which are tested as signs: to decide takes {least} seeds")
    elif used >= 2 and atom.low == atom.high:
        notes.append("the same on every seed")
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
        atoms=tuple(_leaves(tree)),
        seeds=used,
        note="; ".join(notes),
    )
