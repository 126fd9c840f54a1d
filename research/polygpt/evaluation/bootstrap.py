"""Confidence intervals by resampling."""

import numpy as np


def bootstrap_mean(values, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """The mean with its percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3).

    Args:
        values: independent observations, [n] with n >= 1.
        resamples: number of resamples.
        level: coverage of the interval.
        seed: seed of the resampling.

    Returns:
        (mean, low, high)
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    # One resample at a time: n may be large, and 2,000 resamples take well under a second.
    means = np.fromiter(
        (values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)), np.float64
    )
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(values.mean()), float(low), float(high)
