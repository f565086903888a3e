r"""Compare means and standard deviations of draws with those of the weighted draws.

The weights of a guide that is too wide are bounded, and k-hat is small; its draws without weights are as wrong as the
guide.  Both are compared entry by entry.  With weights W of mean 1, the differences of S draws

.. math:: \delta = \frac{\mu_q - \mu_W}{\sigma_W}, \qquad \rho = \log\frac{\sigma_q}{\sigma_W}

have the influence functions

.. math:: \psi_\delta = \frac{(z-\mu_q) - W(z-\mu_W)}{\sigma_W}, \qquad
          \psi_\rho = \tfrac12\Bigl[\frac{(z-\mu_q)^2}{\sigma_q^2} - 1
          - W\Bigl(\frac{(z-\mu_W)^2}{\sigma_W^2} - 1\Bigr)\Bigr],

and the standard error :math:`\sqrt{\mathrm E\psi^2/S}`: both means are of the same draws, so that the error of an exact
guide is 0.  An entry is off where a difference exceeds its limit (a tenth of a standard deviation, a factor of 1.15) by
three standard errors, and undecided where it lies within three standard errors of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_hvae.diagnostics.weights import smoothed_weights

__all__ = ["Moments", "compare_moments"]

SHIFT, RATIO = 0.1, 1.15
"""Accepted differences of means in standard deviations, and ratios of standard deviations."""

SEVERE_SHIFT, SEVERE_RATIO = 1.0, 2.0
_ERRORS = 3.0

_FEWEST = 20
"""Effective number of draws below which a mean or a standard deviation has no standard error: where one weight
dominates, or tails are heavy."""

_SHARE = 0.05
"""Share of a site's entries that may be off."""


@dataclass(frozen=True)
class Moments:
    """Difference of one site's draws from the weighted draws.

    Attributes:
        ratio: standard deviation of the draws over that of the weighted draws: of the entry that is furthest from 1.
        shift: difference of the means in standard deviations of the weighted draws, the largest in absolute value.
        entries: number of entries compared: those with a reliable k-hat.
        off, severe: numbers of entries that differ by more than the accuracy, and by more than a factor of 2 or a
            standard deviation.
        undecided: number of entries that are not off, and may be with more draws.
    """

    ratio: float
    shift: float
    entries: int
    off: int
    severe: int
    undecided: int

    @property
    def differs(self) -> bool:
        """Whether more than a twentieth of the entries are off."""
        return self.off > _SHARE * self.entries

    @property
    def unclear(self) -> bool:
        """Whether more draws may change ``differs``."""
        return not self.differs and self.off + self.undecided > _SHARE * self.entries

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
    over = ("chain", "draw")
    count = draws.sizes["chain"] * draws.sizes["draw"]
    weight = weights["weight"] * count
    mean, weighted_mean = draws.mean(over, skipna=False), (weight * draws).mean(over, skipna=False)
    squared, weighted_squared = (draws - mean) ** 2, (draws - weighted_mean) ** 2
    variance, weighted_variance = squared.mean(over, skipna=False), (weight * weighted_squared).mean(over, skipna=False)

    def flat(values: Any) -> np.ndarray:
        return np.asarray(values.broadcast_like(variance).transpose(*variance.dims).values).ravel()

    valid = flat(trusted & (weighted_variance > 0) & (variance > 0))
    if not valid.any():
        return None
    with np.errstate(all="ignore"):
        log_ratio = 0.5 * np.log(variance / weighted_variance)
        of_variances = squared / variance - weight * (weighted_squared / weighted_variance - 1)
        of_ratio = 0.5 * of_variances.std(over, skipna=False)
        effective = np.minimum(
            count * variance**2 / (squared**2).mean(over, skipna=False),
            count * weighted_variance**2 / ((weight * weighted_squared) ** 2).mean(over, skipna=False),
        )
        del squared, weighted_squared, of_variances  # each as large as the draws
        shift = (mean - weighted_mean) / np.sqrt(weighted_variance)
        of_shift = (draws - weight * (draws - weighted_mean)).std(over, skipna=False) / np.sqrt(weighted_variance)

    ratios, shifts = flat(log_ratio)[valid], flat(shift)[valid]
    enough = flat(weights["ess"])[valid] >= _FEWEST
    known = enough & (flat(effective)[valid] >= _FEWEST)
    ratio_error, shift_error = (_ERRORS / math.sqrt(count) * flat(one)[valid] for one in (of_ratio, of_shift))
    off, severe = (
        (known & (abs(ratios) > math.log(ratio) + ratio_error)) | (enough & (abs(shifts) > most + shift_error))
        for ratio, most in ((RATIO, SHIFT), (SEVERE_RATIO, SEVERE_SHIFT))
    )
    possible = ~enough | (abs(ratios) + ratio_error > math.log(RATIO)) | (abs(shifts) + shift_error > SHIFT)
    return Moments(
        ratio=float(np.exp(ratios[abs(ratios).argmax()])),
        shift=float(shifts[abs(shifts).argmax()]),
        entries=int(valid.sum()),
        off=int(off.sum()),
        severe=int(severe.sum()),
        undecided=int((possible & ~off).sum()),
    )
