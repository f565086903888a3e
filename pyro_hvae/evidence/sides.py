"""Both sides of an interval for log p(x), from log-weights of one round of draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_hvae.weights import log_mean_exp, pareto_khat, product_lower, psis, relative_variance, variance_upper
from pyro_hvae.weights.confidence import group_means

__all__ = [
    "DRAWS_ASSUMED",
    "INFLATION",
    "MOMENT_ASSUMED",
    "MOMENT_KHAT",
    "NONE_ASSUMED",
    "Sides",
    "Weights",
    "smoothed_mean",
]

MOMENT_KHAT = 0.5
"""Weights with a larger k-hat have no variance, and no side by their variance."""

INFLATION = 2.0
"""The assumed bound of the relative variance, in units of that of the draws."""

NONE_ASSUMED = "none: weights are nonnegative, of mean p(x), and their draws independent"
DRAWS_ASSUMED = "posterior_samples are exact posterior draws, independent of each other"
MOMENT_ASSUMED = (
    f"a moment: the relative variance of the weights is at most {INFLATION:g} times that of the draws (used for k-hat "
    f"of at most {MOMENT_KHAT:g}; no upper side elsewhere)"
)


@dataclass(frozen=True)
class Weights:
    """Independent estimates of p(x) and of 1/p(x) for each datum, as log-weights ``(S, *plates)``.

    Attributes:
        forward: log-weights of independent draws, whose weights have the mean p(x).
        reverse: log-weights of independent estimates of 1/p(x) by exact posterior draws; None without these.
    """

    forward: Tensor
    reverse: Tensor | None = None

    def where(self, mask: Tensor, other: Weights) -> Weights:
        """Return the weights of ``other`` where ``mask``, in as many estimates as both have."""
        reverse = None
        if self.reverse is not None and other.reverse is not None:
            reverse = _choose(mask, other.reverse, self.reverse)
        return Weights(_choose(mask, other.forward, self.forward), reverse)


@dataclass(frozen=True)
class Sides:
    """Bounds of log p(x) for each datum, and for the sum over the data, each side at one probability."""

    lower: Tensor
    upper: Tensor
    total_lower: Tensor
    total_upper: Tensor

    @staticmethod
    def of(weights: Weights, delta: float) -> Sides:
        """Compute both sides, each with half of delta."""
        half, dims = delta / 2, weights.forward.dim() - 1
        lower = product_lower(weights.forward, half)
        if weights.reverse is not None:
            upper, total = (-product_lower(weights.reverse, half, sum_dims=d) for d in (0, dims))
        else:
            count = len(weights.forward)
            mean, variance = log_mean_exp(weights.forward.double()), INFLATION * relative_variance(weights.forward)
            known = pareto_khat(weights.forward) <= MOMENT_KHAT
            upper, total = (variance_upper(mean, variance, count, half, sum_dims=d) for d in (0, dims))
            upper = torch.where(known, upper, torch.inf)
            total = torch.where(known.all(), total, torch.inf)
        if not dims:
            return Sides(lower, upper, lower, upper)
        return Sides(lower, upper, product_lower(weights.forward, half, sum_dims=dims), total)

    def where(self, mask: Tensor, other: Sides) -> Sides:
        """Return the bounds of ``other`` for the data where ``mask``; the sum's stay."""
        return replace(
            self,
            lower=torch.where(mask, other.lower, self.lower),
            upper=torch.where(mask, other.upper, self.upper),
        )

    def intersect(self, other: Sides) -> Sides:
        """Return the narrower of the sides; a side from above that contradicts the one from below is dropped."""
        lower = torch.maximum(self.lower, other.lower)
        upper = torch.minimum(self.upper, other.upper)
        total_lower = torch.maximum(self.total_lower, other.total_lower)
        total_upper = torch.minimum(self.total_upper, other.total_upper)
        return Sides(
            lower,
            torch.where(upper < lower, torch.inf, upper),
            total_lower,
            torch.where(total_upper < total_lower, torch.inf, total_upper),
        )


def smoothed_mean(log_weights: Tensor) -> Tensor:
    """Return the log of the mean of Pareto-smoothed weights: an estimate of log p(x), and no bound."""
    plain = log_mean_exp(log_weights.double())
    smoothed, khat = psis(log_weights.double())
    # The draw of median weight is not smoothed, so that its normalised weight tells the sum of all.
    middle = log_weights.double().sort(0).indices[len(log_weights) // 2][None]
    body = log_weights.double().gather(0, middle)[0]
    total = body - smoothed.gather(0, middle)[0]
    estimate = total - torch.tensor(float(len(log_weights)), dtype=torch.float64).log().to(total.device)
    return torch.where(khat.isfinite() & body.isfinite(), estimate, plain)


def _choose(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    count = min(len(one), len(other))
    return torch.where(mask, group_means(one, count), group_means(other, count))
