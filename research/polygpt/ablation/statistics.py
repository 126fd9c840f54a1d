"""Statistics of a few seeds: intervals, effects, Holm's correction, and how many seeds it takes.

Samples have seeds first, [S] or [S, ...]. A seed with a missing value (anything that is not finite) is left out.
Samples that say nothing of their spread are answered, never with NaN: from fewer than two seeds an interval is the
whole line and a p-value 1; without variance an interval is one point and a p-value 0 (1 where every value is zero).
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from scipy import special

RESAMPLES = 10_000
"""Of the bootstrap."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A sample beside another, paired by seed: all but `superiority` is of the differences a - b.

    Attributes:
        mean: of the differences; None without seeds.
        t, bootstrap: 95 % intervals (low, high) of the mean.
        effect: `effect_size` of the differences.
        superiority: `superiority` of a over b, the share of pairs in which a is lower; None without seeds.
        p: of Student's t test that the mean is zero, two-sided.
        seeds: in which both have a value.
    """

    mean: float | None
    t: tuple[float, float]
    bootstrap: tuple[float, float]
    effect: float | None
    superiority: float | None
    p: float
    seeds: int


def complete(x_S) -> np.ndarray:
    """The seeds all of whose values are finite, float64 [at most S, ...]."""
    x_S = np.asarray(x_S, np.float64)
    return x_S[np.isfinite(x_S).all(axis=tuple(range(1, x_S.ndim)))]


def interval_t(x_S, level: float = 0.95):
    """Student's t interval of the mean over seeds.

    Args:
        x_S: samples, [S] or [S, ...].
        level: probability that the interval of a normal sample covers the true mean.

    Returns:
        (low, high): floats for [S], arrays [...] otherwise.
    """
    x_S = complete(x_S)
    n = len(x_S)
    if n < 2:
        return _whole_line(x_S)
    half = special.stdtrit(n - 1, (1 + level) / 2) * x_S.std(axis=0, ddof=1) / math.sqrt(n)
    return _plain(x_S.mean(axis=0) - half, x_S.mean(axis=0) + half)


def interval_bootstrap(x_S, level: float = 0.95, seed: int = 0):
    """Studentised bootstrap interval of the mean over seeds: what Student's t would be, asked of the sample itself.

    Every resample has a statistic t* = (mean* - mean) / standard error*; the interval is from mean - q s to mean - p s,
    p and q the outer quantiles of t* and s the sample's standard error. Efron and Tibshirani 1993, "An Introduction to
    the Bootstrap", section 12.5; second-order accurate (Hall 1988), so that it leans as a skewed sample does.

    Percentile intervals will not do for a few values: none reaches past the smallest and the largest, which at n = 5
    have the mean between them in 93.75 % of samples. Measured over 4,000 samples, this one covers at level 0.95 from 4
    to 20 values 94.8 to 95.2 % if they are normal, and is 1.3 times as wide as Student's interval at n = 5, 1.06 times
    at 8; if they are exponential it covers 93.2 % at n = 5, where Student's has 88.5 %.

    `evaluation.bootstrap.bootstrap_mean` is its like for thousands of examples, where percentiles will do.

    Args:
        x_S: samples, [S] or [S, ...]; the same resamples serve all columns.
        level: probability that the interval covers the true mean.
        seed: of the resamples.

    Returns:
        (low, high): floats for [S], arrays [...] otherwise. Of two or three values, whose resamples too often have no
        spread, the whole line.
    """
    x_S = complete(x_S)
    if len(x_S) < 2:
        return _whole_line(x_S)
    around = x_S - x_S[0]  # so that a sample without variance has an interval without width, to the bit
    resampled = _resampled(around, np.random.default_rng(seed))
    low, high = _studentised(around.mean(axis=0), around.var(axis=0, ddof=1) / len(x_S), *resampled, level)
    return _plain(x_S[0] + low, x_S[0] + high)


def interval_bootstrap_unpaired(a_S, b_T, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """`interval_bootstrap` of the difference of two means, of samples [S] and [T] that are drawn anew by themselves."""
    samples, rng = [complete(a_S), complete(b_T)], np.random.default_rng(seed)
    if min(map(len, samples)) < 2:
        return -math.inf, math.inf
    around = [x_S - x_S[0] for x_S in samples]
    (off, variances), (other, its) = (_resampled(one, rng) for one in around)
    error = sum(one.var(ddof=1) / len(one) for one in around)
    return _plain(*_studentised(samples[0].mean() - samples[1].mean(), error, off - other, variances + its, level))


def _resampled(around: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How far the mean of each resample is from the sample's, and its squared standard error: [RESAMPLES, ...].

    `around` is the sample [S, ...] less its first value, by which rounding stays below its spread.
    """
    n = len(around)
    counts = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)  # [resample, S]
    means = np.tensordot(counts, around, axes=1) / n
    variance = (np.tensordot(counts, around**2, axes=1) / n - means**2) / (n - 1)
    # A resample of one value alone has none, but for rounding.
    variance[variance <= 1e-14 * np.abs(around).max(axis=0) ** 2] = 0
    return means - around.mean(axis=0), variance


def _studentised(mean, variance, off, variances, level: float):
    """(low, high) of an estimate and its squared standard error, by those of resamples."""
    flat = variances == 0
    t = np.where(flat, np.copysign(np.inf, off), off / np.sqrt(np.where(flat, 1, variances)))
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
    error = np.sqrt(np.where(variance == 0, 1, variance))
    return tuple(np.where(variance == 0, mean, mean - q * error) for q in (high, low))


def t_statistic(d_S) -> float:
    """sqrt(S) mean / standard deviation of differences [S]; without variance an infinity of the mean's sign, or 0.

    Differences that agree to twelve digits have no variance.
    """
    d_S = complete(d_S)
    if len(d_S) < 2 or not d_S.any():
        return 0.0
    if np.ptp(d_S) <= 1e-12 * np.abs(d_S).max():
        return math.copysign(math.inf, d_S[0])
    return float(d_S.mean() / d_S.std(ddof=1) * math.sqrt(len(d_S)))


def one_sided(d_S) -> tuple[float, float]:
    """p-values of Student's t test on differences [S]: (against a mean <= 0, against a mean >= 0)."""
    d_S = complete(d_S)
    if len(d_S) < 2 or not d_S.any():
        return 1.0, 1.0
    t = t_statistic(d_S)
    return float(special.stdtr(len(d_S) - 1, -t)), float(special.stdtr(len(d_S) - 1, t))


def effect_size(d_S) -> float | None:
    """Mean over standard deviation of paired differences [S], without the bias of a small sample.

    Cohen's d_z (Lakens 2013, "Calculating and reporting effect sizes") times Hedges' factor J(S - 1) (Hedges 1981,
    "Distribution theory for Glass's estimator of effect size"), which is 0.80 at five seeds. There is no factor for two
    seeds: their effect is as it comes. None of fewer than two; infinite without variance, but 0 if all are zero.
    """
    d_S = complete(d_S)
    freedom = len(d_S) - 1
    if freedom < 1:
        return None
    d_z = t_statistic(d_S) / math.sqrt(len(d_S))
    if freedom == 1 or math.isinf(d_z):
        return d_z
    return d_z * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)


def superiority(a_S, b_S) -> float | None:
    """P(a < b) + P(a = b) / 2 over all pairs of a value of `a_S` and one of `b_S`; None if either has none.

    The probability of superiority of lower values (Vargha and Delaney 2000, "A critique and improvement of the CL
    common language effect size statistics", A; the Mann-Whitney U over the number of pairs).
    """
    a_S, b_S = complete(a_S), complete(b_S)
    if not (len(a_S) and len(b_S)):
        return None
    return float(np.mean((np.sign(b_S[None, :] - a_S[:, None]) + 1) / 2))


def holm(p) -> np.ndarray:
    """p-values adjusted so that rejecting those <= alpha rejects a true hypothesis with a chance of at most alpha.

    Holm 1979, "A simple sequentially rejective multiple test procedure": the i-th smallest of m, times m - i + 1, and
    at least the one before it. Shape [m], in the order given.
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def seeds_needed(effect, alpha=0.05, power: float = 0.8, most: int = 10_000) -> int | None:
    """The smallest number of seeds at which a two-sided paired t test finds an effect with a chance of `power`.

    By the noncentral distribution of t (Cohen 1988, "Statistical power analysis for the behavioral sciences", chapter
    2), squared. Several effects are to be found all at once: what is missed of each adds up (Bonferroni's inequality).

    Args:
        effect: the mean over the standard deviation, by its size; an array [k] for k that are all to be found.
        alpha: level of the test; an array [k] for one of each.
        power: the chance wanted.
        most: seeds beyond which nobody would go.

    Returns:
        At least 2; None if not even `most` would do.
    """
    effect, alpha = np.broadcast_arrays(np.abs(np.atleast_1d(np.asarray(effect, np.float64))), alpha)
    known = np.isfinite(effect)  # an infinite effect is found by any two seeds
    effect, alpha = effect[known], alpha[known]

    def enough(n: int) -> bool:
        critical = special.stdtrit(n - 1, 1 - alpha / 2)
        missed = special.ncfdtr(1, n - 1, n * effect**2, critical**2)
        return missed[~np.isnan(missed)].sum() <= 1 - power  # SciPy has NaN for some that underflow

    if not enough(most):
        return None
    low, high = 1, most  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def pooled_deviation(samples: Iterable) -> float | None:
    """The standard deviation over seeds, pooled over samples [S, ...] and their columns by degrees of freedom.

    Missing values are left out one by one. None where no column has two values.
    """
    squares, freedom = 0.0, 0
    for sample in samples:
        x_SK = np.asarray(sample, np.float64).reshape(len(sample), math.prod(np.shape(sample)[1:]))
        for x_S in map(complete, x_SK.T):
            squares += float(((x_S - x_S.mean()) ** 2).sum()) if len(x_S) else 0.0
            freedom += max(len(x_S) - 1, 0)
    return math.sqrt(squares / freedom) if freedom else None


def compare(a_S, b_S) -> Compared:
    """`a_S` beside `b_S`, [S] each, paired by seed."""
    a_S, b_S = complete(np.stack([np.asarray(a_S, np.float64), np.asarray(b_S, np.float64)], axis=1)).T
    d_S = a_S - b_S
    return Compared(
        mean=float(d_S.mean()) if len(d_S) else None,
        t=interval_t(d_S),
        bootstrap=interval_bootstrap(d_S),
        effect=effect_size(d_S),
        superiority=superiority(a_S, b_S),
        p=min(1.0, 2 * min(one_sided(d_S))),
        seeds=len(d_S),
    )


def _whole_line(x_S: np.ndarray):
    low = np.full(x_S.shape[1:], -np.inf)
    return _plain(low, -low)


def _plain(low, high):
    """Floats for arrays of no axes."""
    return (low, high) if np.ndim(low) else (float(low), float(high))
