r"""The tail of the weights, and the generalised Pareto distribution fitted to many tails at once.

A tail is the M + 1 largest log-weights of each row in ascending order, relative to the row's largest: first
the cutoff, which is the largest weight below the tail, then the M weights of the tail, of which the last is 0.

The distribution has the density :math:`\sigma^{-1}(1 + k y/\sigma)^{-1/k - 1}` at y > 0, with shape k and scale
:math:`\sigma`.  With :math:`b = -k/\sigma` the shape has a closed form given b,
:math:`k(b) = M^{-1}\sum_i\log(1 - b y_i)`, and so has the profile likelihood; the estimate of b is its mean under the
profile likelihood and a data-dependent prior, by quadrature (A New and Efficient Estimation Method for the Generalized
Pareto Distribution, Zhang and Stephens, 2009).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "LEAST_DRAWS",
    "TIE",
    "constant_tail",
    "excess",
    "fit_tail",
    "group_ends",
    "mean_of_ties",
    "quadrature_size",
    "quantiles",
    "tail_size",
    "tied_cutoff",
]

LEAST_DRAWS = 25
"""Fewer draws have a tail of fewer than 5, to which no shape is fitted."""

TIE = 1e-10
"""Log-weights that differ by less are equal."""

_PRIOR_DRAWS, _PRIOR_SHAPE = 10, 0.5
"""k-hat is averaged with a shape of 0.5 that has the weight of 10 draws (Vehtari et al., 2024)."""


def tail_size(num_draws: int) -> int:
    """Return the number of largest weights that are fitted (Vehtari et al., 2024)."""
    return int(min(num_draws / 5, 3 * num_draws**0.5))


def quadrature_size(count: int) -> int:
    """Return the number of points at which the profile likelihood of ``count`` weights is computed."""
    return 30 + int(count**0.5)


def constant_tail(tail: Tensor) -> Tensor:
    """Return in which rows of ``(R, M + 1)`` all weights of the tail are equal."""
    return tail[:, -1] - tail[:, 1] < TIE


def tied_cutoff(tail: Tensor) -> Tensor:
    """Return in which rows of ``(R, M + 1)`` a quarter of the tail is no larger than the cutoff.

    The fit would divide by zero there.  This happens for weights with ties, and for weights that underflow beside the
    largest.
    """
    cutoff, quarter = tail[:, 0], tail[:, 1 + _quarter_index(tail.shape[-1] - 1)]
    return (quarter <= cutoff + TIE) | (quarter.exp() == cutoff.exp())


def excess(tail: Tensor) -> Tensor:
    """Return the weights of the tail less the cutoff, ``(R, M)`` from ``(R, M + 1)``, without cancellation."""
    cutoff, above = tail[:, :1], tail[:, 1:]
    return (above.exp() * -torch.expm1(cutoff - above)).masked_fill(above == -torch.inf, 0.0)


def fit_tail(above: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the shape k and the scale of each row's tail.

    Args:
        above: :math:`y_i\ge 0`, ``(R, M)`` in ascending order; the first quarter's last entry must be positive.

    Returns:
        k-hat, shrunk towards 0.5, and :math:`\sigma`, both ``(R,)``; NaN where the numbers overflow.
    """
    count, points = above.shape[-1], quadrature_size(above.shape[-1])
    index = torch.arange(1, points + 1, dtype=above.dtype, device=above.device)
    quarter, largest = above[:, _quarter_index(count), None], above[:, -1:]
    b = _away_from_zero(1 / largest + (1 - (points / (index - 0.5)).sqrt()) / (3 * quarter))
    k = (-b[..., None] * above[:, None]).log1p_().mean(-1)
    profile = count * ((-b / k).log() - k - 1)
    mean_b = _away_from_zero((profile.softmax(-1) * b).sum(-1, keepdim=True))
    k = (-mean_b * above).log1p_().mean(-1)
    scale = -k / mean_b[:, 0]
    return (count * k + _PRIOR_DRAWS * _PRIOR_SHAPE) / (count + _PRIOR_DRAWS), scale


def quantiles(shape: Tensor, scale: Tensor, count: int) -> Tensor:
    """Return the quantiles of the fitted distributions at (i - 1/2) / M, ``(R, M)`` in ascending order."""
    index = torch.arange(1, count + 1, dtype=shape.dtype, device=shape.device)
    exponential = -torch.log1p(-(index - 0.5) / count)
    k = _away_from_zero(shape)[:, None]
    return scale[:, None] * torch.expm1(k * exponential) / k


def group_ends(first: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the start of each element's group, and of the next group.

    Args:
        first: ``(R, S)``, True at the start of each group; True in the first column.
    """
    count = first.shape[-1]
    index = torch.arange(count, device=first.device).expand_as(first)
    start = index.masked_fill(~first, 0).cummax(-1).values
    after = torch.full_like(index, count)
    after[:, :-1] = index.masked_fill(~first, count)[:, 1:].flip(-1).cummin(-1).values.flip(-1)
    return start, after


def mean_of_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """Average ``values`` ``(R, M)`` over elements that are equal in ``ordered``; both ascend."""
    tied = ordered[:, 1:] == ordered[:, :-1]
    if not bool(tied.any()):
        return values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ~tied
    start, after = group_ends(first)
    sums = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    return (sums.gather(-1, after) - sums.gather(-1, start)) / (after - start)


def _quarter_index(count: int) -> int:
    """Return the index of the lower quartile among ``count`` ascending values; the fit takes its unit from it."""
    return int(count / 4 + 0.5) - 1


def _away_from_zero(values: Tensor) -> Tensor:
    """Replace exact zeros, at which the formulas are limits of the form 0/0."""
    return values.masked_fill(values == 0, 1e-12)
