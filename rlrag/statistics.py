"""Intervals for differences between arms of a study: paired by seed, and where there are questions, by question too."""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's interval of the mean of independent values, here the differences of two arms seed by seed.

    mean +- t(n - 1) s / sqrt(n). One value has no interval: (nan, nan).
    """
    from scipy.stats import t  # late: it imports for long

    x = np.asarray(values, float)
    if len(x) < 2:
        return float("nan"), float("nan")
    half = float(t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()) - half, float(x.mean()) + half


def two_level_bootstrap(
    a: np.ndarray, b: np.ndarray, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of a - b, [seeds, questions] each and paired in both: seeds are drawn with
    replacement, and questions with replacement within the draw (the same for every seed: they are the same questions).

    Raises ValueError for fewer than 5 seeds: a bootstrap over three values says nothing of their spread.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"scores of two arms must both be [seeds, questions], got {a.shape} and {b.shape}")
    if len(a) < 5:
        raise ValueError(f"a bootstrap over {len(a)} seeds: give at least 5, or take t_interval")
    difference, dice = a - b, np.random.default_rng(seed)
    seeds, questions = difference.shape
    means = np.empty(resamples)
    for index in range(resamples):
        rows = np.bincount(dice.integers(seeds, size=seeds), minlength=seeds)
        columns = np.bincount(dice.integers(questions, size=questions), minlength=questions)
        means[index] = rows @ difference @ columns / (seeds * questions)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
