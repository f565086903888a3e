r"""Compare means and standard deviations of draws with those of the weighted draws.

The weights of a guide that is too wide are bounded, and k-hat is small; its draws without weights are as wrong as the
guide.  Both are compared entry by entry; an entry
counts as off where the difference exceeds a quarter (of the standard deviation, or of its logarithm's 1.25) by three
standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_hvae.diagnostics.weights import smoothed_weights

__all__ = ["Moments", "compare_moments"]

SHIFT, RATIO = 0.25, 1.25
"""Accepted differences of means in standard deviations, and ratios of standard deviations."""

SEVERE_SHIFT, SEVERE_RATIO = 1.0, 2.0
_ERRORS = 3.0


@dataclass(frozen=True)
class Moments:
    """Difference of one site's draws from the weighted draws.

    Attributes:
        ratio: standard deviation of the draws over that of the weighted draws: of the entry that is furthest from 1.
        shift: difference of the means in standard deviations of the weighted draws, the largest in absolute value.
        entries: number of entries compared: those with a reliable k-hat.
        off, severe: numbers of entries that differ by more than a quarter, and by more than a factor of 2 or a standard
            deviation.
    """

    ratio: float
    shift: float
    entries: int
    off: int
    severe: int

    def words(self, name: str) -> str:
        """Describe the larger of the two differences."""
        if abs(math.log(self.ratio)) / math.log(RATIO) > abs(self.shift) / SHIFT:
            text = f"sd of {name} {self.ratio:.2g} times the weighted draws'"
        else:
            side = "above" if self.shift > 0 else "below"
            text = f"mean of {name} {abs(self.shift):.2g} sd {side} the weighted draws'"
        return text + (f" ({self.off} of {self.entries} entries)" if self.entries > 1 else "")


def compare_moments(tree: Any) -> dict[str, Moments]:
    """Compare the draws of each site in the posterior group with the weighted draws.

    Args:
        tree: of :func:`pyro_hvae.diagnostics.to_datatree`, with ``posterior`` and ``sample_stats``.

    Returns:
        By site; sites without a datum of reliable k-hat are left out.
    """
    weights = smoothed_weights(tree)
    trusted = weights["khat"] <= weights.attrs["good_k"]
    by_site = {}
    for name, draws in tree["posterior"].data_vars.items():
        if not set(trusted.dims) <= set(draws.dims) or draws.dtype.kind not in "iuf":
            continue
        moments = _of_site(draws.astype(float), weights, trusted)
        if moments is not None:
            by_site[str(name)] = moments
    return by_site


def _of_site(draws: Any, weights: Any, trusted: Any) -> Moments | None:
    weight, ess = weights["weight"], weights["ess"]
    count = draws.sizes["chain"] * draws.sizes["draw"]
    mean, sd, error = _moments(draws, 1.0 / count, count)
    weighted_mean, weighted_sd, weighted_error = _moments(draws, weight, ess)
    valid = (trusted & (weighted_sd > 0) & (sd > 0)).broadcast_like(sd).values.ravel()
    if not valid.any():
        return None
    with np.errstate(all="ignore"):
        log_ratio = np.log((sd / weighted_sd).values.ravel())[valid]
        ratio_error = (np.hypot(error, weighted_error).broadcast_like(sd)).values.ravel()[valid]
        shift = ((mean - weighted_mean) / weighted_sd).values.ravel()[valid]
        shift_error = np.sqrt(np.exp(2 * log_ratio) / count + (1 / ess).broadcast_like(sd).values.ravel()[valid])
    off, severe = (
        (abs(log_ratio) > math.log(ratio) + _ERRORS * ratio_error) | (abs(shift) > most + _ERRORS * shift_error)
        for ratio, most in ((RATIO, SHIFT), (SEVERE_RATIO, SEVERE_SHIFT))
    )
    return Moments(
        ratio=float(np.exp(log_ratio[abs(log_ratio).argmax()])),
        shift=float(shift[abs(shift).argmax()]),
        entries=int(valid.sum()),
        off=int(off.sum()),
        severe=int(severe.sum()),
    )


def _moments(draws: Any, weight: Any, count: Any) -> tuple[Any, Any, Any]:
    """Return mean, standard deviation, and the standard error of the logarithm of the latter."""
    over = ("chain", "draw")
    mean = (weight * draws).sum(over)
    squared = (draws - mean) ** 2
    variance = (weight * squared).sum(over)
    spread = (weight * (squared - variance) ** 2).sum(over)
    with np.errstate(all="ignore"):
        error = 0.5 * np.sqrt(spread / count) / variance
    return mean, np.sqrt(variance), error
