r"""Test the uniformity of ranks, and describe deviations.

Of N ranks, each uniform on 0, ..., L, the number that is at most k is binomial; the smallest of its two-sided tail
probabilities over all k is the statistic, whose distribution under uniformity is simulated.  The p-value and the bands
around the empirical distribution function hold simultaneously for all k (Graphical Test for Discrete Uniformity and Its
Applications in Goodness-of-Fit Evaluation and Multiple Sample Comparison, Säilynoja, Bürkner and Vehtari, 2022).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

__all__ = ["Uniformity", "ecdf_bands", "uniformity"]

_POINTS = 100
_SIMULATIONS = 2000


class Uniformity(NamedTuple):
    """The test of one set of ranks.

    Attributes:
        p_value: of uniformity; its resolution is 1 / 2001.
        shift: standardised mean of the ranks; positive where the truth ranks high among the draws.
        spread: standardised variance; positive where ranks pile up at both ends.
    """

    p_value: float
    shift: float
    spread: float

    def words(self, alpha: float) -> str:
        """Describe the ranks at level ``alpha``."""
        if self.p_value >= alpha:
            return "uniform"
        if max(abs(self.shift), abs(self.spread)) < 2.0:
            return "of another shape"
        if abs(self.shift) > abs(self.spread):
            return "draws too low" if self.shift > 0 else "draws too high"
        return "draws too narrow" if self.spread > 0 else "draws too wide"


def uniformity(ranks: np.ndarray, num_draws: int) -> Uniformity:
    """Test ranks (N,) among ``num_draws`` draws each, 0 to L.

    Raises:
        ValueError: for ranks outside of 0, ..., L.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> uniformity(rng.integers(0, 101, 500), 100).words(0.01)
        'uniform'
        >>> uniformity(rng.binomial(100, 0.5, 500), 100).words(0.01)
        'draws too wide'
    """
    ranks = np.asarray(ranks)
    if ranks.min() < 0 or ranks.max() > num_draws:
        raise ValueError(f"ranks must lie within 0 and {num_draws}, got {ranks.min()} to {ranks.max()}")
    size = len(ranks)
    points, null = _null(size, num_draws)
    counts = np.searchsorted(np.sort(ranks), points, side="right")
    p_value = (1 + int((null <= _smallest_tail(counts[None], points, size, num_draws)[0]).sum())) / (1 + len(null))
    centred = (ranks + 0.5) / (num_draws + 1) - 0.5
    count = num_draws + 1
    variance = (count**2 - 1) / (12 * count**2)
    fourth = (count**2 - 1) * (3 * count**2 - 7) / (240 * count**4)
    return Uniformity(
        p_value,
        float(centred.mean() / math.sqrt(variance / size)),
        float(((centred**2).mean() - variance) / math.sqrt((fourth - variance**2) / size)),
    )


def ecdf_bands(size: int, num_draws: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return simultaneous bands of the empirical distribution function of N ranks.

    Returns:
        Points in (0, 1], and the lower and upper ends of the bands there.

    Example:
        >>> points, low, high = ecdf_bands(200, 50)
        >>> bool(((low <= points) & (points <= high)).all())
        True
    """
    from scipy.stats import binom

    points, null = _null(size, num_draws)
    tail = float(np.quantile(null, 1 - level)) / 2
    share = (points + 1) / (num_draws + 1)
    return share, binom.ppf(tail, size, share) / size, binom.ppf(1 - tail, size, share) / size


def _smallest_tail(counts: np.ndarray, points: np.ndarray, size: int, num_draws: int) -> np.ndarray:
    return _tails(size, num_draws)[np.arange(len(points)), counts].min(-1)


def _points(num_draws: int) -> np.ndarray:
    """Return the ranks at which the distribution function is compared."""
    return np.unique(np.linspace(0, num_draws - 1, min(_POINTS, num_draws)).round().astype(int))


@lru_cache(maxsize=8)
def _tails(size: int, num_draws: int) -> np.ndarray:
    """Return the two-sided tail probability of every count (columns) at every point (rows)."""
    from scipy.stats import binom

    share = (_points(num_draws)[:, None] + 1) / (num_draws + 1)
    counts = np.arange(size + 1)
    low, high = binom.cdf(counts, size, share), binom.sf(counts - 1, size, share)
    return (2 * np.minimum(low, high)).clip(max=1.0)


@lru_cache(maxsize=32)
def _null(size: int, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the points, and simulated statistics of uniform ranks there."""
    rng = np.random.default_rng(size * 1_000_003 + num_draws)
    points = _points(num_draws)
    counts = np.empty((_SIMULATIONS, len(points)), dtype=int)
    for i in range(_SIMULATIONS):
        counts[i] = np.searchsorted(np.sort(rng.integers(0, num_draws + 1, size)), points, side="right")
    return points, _smallest_tail(counts, points, size, num_draws)
