"""Confidence intervals of a mean over a few seeds: Student's t and the studentised bootstrap.

Samples have seeds on the first axis, [S] or [S, ...]. A seed with a missing (non-finite) value is left out. An interval
of fewer than two seeds is the whole line; one of a sample without variance is a single point.
"""

import math

import numpy as np
import scipy

RESAMPLES = 10_000
"""Bootstrap resamples."""


def complete(x_S) -> np.ndarray:
    """The seeds whose values are all finite, float64 [at most S, ...]."""
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
    half = scipy.special.stdtrit(n - 1, (1 + level) / 2) * x_S.std(axis=0, ddof=1) / math.sqrt(n)
    return plain(x_S.mean(axis=0) - half, x_S.mean(axis=0) + half)


def interval_bootstrap(x_S, level: float = 0.95, seed: int = 0):
    """Studentised (bootstrap-t) interval of the mean over seeds: estimates the distribution of t from the sample.

    Every resample has a statistic t* = (mean* - mean) / standard error*; the interval is from mean - q s to mean - p s,
    p and q the outer quantiles of t* and s the sample's standard error. Efron and Tibshirani 1993, "An Introduction to
    the Bootstrap", section 12.5; second-order accurate (Hall 1988), so it is asymmetric for skewed samples.

    Percentile intervals fail for a few values: they never extend beyond the smallest and largest value, which at n = 5
    enclose the mean in 93.75 % of samples. Measured over 4,000 samples, this one covers at level 0.95 from 4 to 20
    values 94.8 to 95.2 % if they are normal, and is 1.3 times as wide as Student's interval at n = 5, 1.06 times at 8;
    if they are exponential it covers 93.2 % at n = 5, where Student's has 88.5 %.

    `evaluation.bootstrap.bootstrap_mean` is the counterpart for thousands of examples, where percentiles are accurate.

    Args:
        x_S: samples, [S] or [S, ...]; all columns share the same resamples.
        level: probability that the interval covers the true mean.
        seed: seed of the resampling.

    Returns:
        (low, high): floats for [S], arrays [...] otherwise. Of two or three values, whose resamples too often have no
        spread, the whole line.
    """
    x_S = complete(x_S)
    if len(x_S) < 2:
        return _whole_line(x_S)
    around = x_S - x_S[0]  # so that a sample without variance has an interval of exactly zero width
    resampled = _resampled(around, np.random.default_rng(seed))
    low, high = _studentised(around.mean(axis=0), around.var(axis=0, ddof=1) / len(x_S), *resampled, level)
    return plain(x_S[0] + low, x_S[0] + high)


def interval_bootstrap_unpaired(a_S, b_T, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """`interval_bootstrap` of the difference of two means; the samples [S] and [T] are resampled independently."""
    samples, rng = [complete(a_S), complete(b_T)], np.random.default_rng(seed)
    if min(map(len, samples)) < 2:
        return -math.inf, math.inf
    around = [x_S - x_S[0] for x_S in samples]
    (off, variances), (other, its) = (_resampled(one, rng) for one in around)
    error = sum(one.var(ddof=1) / len(one) for one in around)
    return plain(*_studentised(samples[0].mean() - samples[1].mean(), error, off - other, variances + its, level))


def _resampled(around: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How far the mean of each resample is from the sample's, and its squared standard error: [RESAMPLES, ...].

    `around` is the sample [S, ...] minus its first value, which keeps rounding errors below its spread.
    """
    n = len(around)
    counts = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)  # [resample, S]
    means = np.tensordot(counts, around, axes=1) / n
    variance = (np.tensordot(counts, around**2, axes=1) / n - means**2) / (n - 1)
    # A resample of a single repeated value has no variance, up to rounding.
    variance[variance <= 1e-14 * np.abs(around).max(axis=0) ** 2] = 0
    return means - around.mean(axis=0), variance


def _studentised(mean, variance, off, variances, level: float):
    """(low, high) for an estimate with its squared standard error, from those of the resamples."""
    flat = variances == 0
    t = np.where(flat, np.copysign(np.inf, off), off / np.sqrt(np.where(flat, 1, variances)))
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
    error = np.sqrt(np.where(variance == 0, 1, variance))
    return tuple(np.where(variance == 0, mean, mean - q * error) for q in (high, low))


def _whole_line(x_S: np.ndarray):
    low = np.full(x_S.shape[1:], -np.inf)
    return plain(low, -low)


def plain(low, high):
    """The ends of an interval, as floats if they are scalars."""
    return (low, high) if np.ndim(low) else (float(low), float(high))
