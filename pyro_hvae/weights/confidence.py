r"""Confidence bounds for the mean of nonnegative weights, in logarithms.

The draws of a datum are independent, and have weights :math:`w_s\ge 0` of mean Z.  Bounds from below assume nothing
else: by Markov's inequality a nonnegative variable of mean one exceeds :math:`1/\delta` with a probability of at most
:math:`\delta`, and products of independent such variables are again nonnegative and of mean one.  Weights with the
mean 1/Z, as those of posterior draws, give upper bounds of Z in the same way.

A bound from above by weights of mean Z needs an assumption, since draws may miss the largest weights: here, a known
relative variance of the weights.

All functions take log-weights with the draws along the first dim.  With ``sum_dims=k`` the last k dims are data
whose draws are independent of each other, and the bound is that of the sum :math:`\sum_n\log Z_n` over them; it is
much narrower than the sum of the data's bounds.  Results are in float64.
"""

from __future__ import annotations

import math
import numbers as real

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count
from pyro_hvae.weights.means import check_weights, log_mean_exp

__all__ = [
    "group_means",
    "log_inverse",
    "markov_lower",
    "mean_lower",
    "median_lower",
    "product_lower",
    "relative_variance",
    "variance_upper",
]

_LEAST_PILOT = 16
"""Draws from which the number of averages in a product is chosen; with fewer there is a single average."""


def markov_lower(log_weights: Tensor, delta: float, *, sum_dims: int = 0) -> Tensor:
    r"""Bound log Z from below by the mean weight, :math:`\log\bar w - \log(1/\delta)`.

    Valid also for draws that depend on each other.

    Args:
        log_weights: S along the first dim, in nats; ``-inf`` is a weight of zero.
        delta: probability that the bound does not hold, in (0, 1).
        sum_dims: number of last dims over which log Z is summed.

    Returns:
        The bound in nats, the shape without the first and the last ``sum_dims`` dims.

    Raises:
        ValueError: for a ``delta`` outside of (0, 1), or no draws.

    Example:
        >>> markov_lower(torch.zeros(10), 0.05).round(decimals=4)
        tensor(-2.9957, dtype=torch.float64)
    """
    return _summed(log_mean_exp(_checked(log_weights, sum_dims)), sum_dims) - log_inverse(delta)


def median_lower(log_weights: Tensor, delta: float, *, num_groups: int = 27, sum_dims: int = 0) -> Tensor:
    r"""Bound log Z from below by the median of R group means.

    A group mean exceeds aZ with a probability of at most 1/a, so the median M does with at most
    :math:`P(\mathrm{Bin}(R, 1/a)\ge (R+1)/2)`.  With a such that this is :math:`\delta`, :math:`\log M - \log a`.

    Args:
        num_groups: R, odd; fewer where there are not so many draws.
        log_weights, delta, sum_dims: as in :func:`markov_lower`.

    Raises:
        ValueError: for a ``delta`` outside of (0, 1), no draws, or an even number of groups.

    Reference:
        Problem Complexity and Method Efficiency in Optimization (Nemirovsky and Yudin, 1983) for medians of means.

    Example:
        >>> median_lower(torch.zeros(270), 0.05).round(decimals=2)
        tensor(-1.0600, dtype=torch.float64)
    """
    log_inverse(delta)
    log_weights = _checked(log_weights, sum_dims)
    if num_groups < 1 or num_groups % 2 == 0:
        raise ValueError(f"a median needs an odd number of groups, got {num_groups}")
    count = min(num_groups, len(log_weights) - (len(log_weights) + 1) % 2)
    groups = _summed(group_means(log_weights, count), sum_dims)
    return groups.median(0).values + math.log(_binomial_share(count, delta))


def product_lower(log_weights: Tensor, delta: float, *, sum_dims: int = 0) -> Tensor:
    r"""Bound log Z from below by a product of G independent averages of the weights.

    .. math:: P\Bigl(\prod_g\bar w_g > Z^G/\delta\Bigr)\le\delta, \qquad
              \log Z\ge\frac1G\Bigl(\sum_g\log\bar w_g - \log\tfrac1\delta\Bigr).

    G = 1 is Markov's inequality; G = S is the mean log-weight less :math:`\log(1/\delta)/S`.  The first eighth of the
    draws is one average, and chooses G for the others, which keeps the bound valid.  The result is the larger of this
    bound and Markov's, each at :math:`\delta/2`.  Its distance from log Z is about
    :math:`\sqrt{2\,\mathrm{Var}(w/Z)\log(2/\delta)/S}`.

    Args:
        log_weights, delta, sum_dims: as in :func:`markov_lower`; draws are in random order.

    Raises:
        ValueError: for a ``delta`` outside of (0, 1), or no draws.

    Reference:
        Estimating Means of Bounded Random Variables by Betting (Waudby-Smith and Ramdas, 2024), of which this is the
        case of nonnegative variables with a bet that changes once.

    Example:
        >>> product_lower(torch.zeros(1000), 0.05).round(decimals=3)
        tensor(-0.0040, dtype=torch.float64)
    """
    nats = log_inverse(delta)
    log_weights = _checked(log_weights, sum_dims)
    whole = _summed(log_mean_exp(log_weights), sum_dims)
    first = len(log_weights) // 8
    if first < _LEAST_PILOT:
        return _in_groups(log_weights, whole, nats, sum_dims)
    pilot, rest = log_weights[:first], log_weights[first:]
    numbers = _numbers(len(rest))
    variance = relative_variance(pilot)
    # The expected distance: log(2/delta)/G, and the mean of log Z - log average, that of a lognormal weight.
    half = nats + math.log(2)
    cost = torch.stack(
        [half / (g + 1) + _summed(0.5 * torch.log1p(variance * g / len(rest)), sum_dims) for g in numbers]
    )
    chosen = cost.argmin(0)
    product = torch.full_like(whole, -torch.inf)
    for index in chosen.unique().tolist():
        count = numbers[index]
        logs = _summed(log_mean_exp(pilot), sum_dims) + _summed(group_means(rest, count), sum_dims).sum(0)
        product = torch.where(chosen == index, (logs - half) / (count + 1), product)
    return torch.maximum(product, whole - half)


def variance_upper(
    log_mean: Tensor,
    relative_variance: Tensor,
    num_draws: int | Tensor,
    delta: float,
    *,
    sum_dims: int = 0,
) -> Tensor:
    r"""Bound log Z from above, given the relative variance :math:`v=\mathrm{Var}(w)/Z^2` of the weights.

    :math:`1-w/Z` is at most one and has variance v, so that by Bennett's inequality the mean weight is below
    :math:`(1-t)Z` with a probability of at most :math:`\delta`, where :math:`S v\,h(t/v) = \log(1/\delta)` with
    :math:`h(u)=(1+u)\log(1+u)-u`; then :math:`\log Z\le\log\bar w-\log(1-t)`.

    For a sum over N data, half of :math:`\delta` is for the event that one of the means is below :math:`1-t_n`.
    Otherwise each :math:`-\log(\bar w_n/Z_n)` is at most :math:`B=-\log(1-t_n)`, has a mean of at most
    :math:`c_nv_n/S` with :math:`c_n = (B-t_n)/t_n^2`, and a mean square of at most
    :math:`v_n/(S(1-t_n)^2)`, and Bennett's inequality holds for their sum.

    Args:
        log_mean: the log of the mean weight, ``(*batch, *data)``, in nats.
        relative_variance: v, of the same shape.
        num_draws: S; a tensor where data differ.
        delta: probability that the bound does not hold, in (0, 1).
        sum_dims: number of last dims over which log Z is summed.

    Returns:
        The bound in nats; ``inf`` where the draws are too few for one.

    Raises:
        ValueError: for a ``delta`` outside of (0, 1).

    Reference:
        Probability Inequalities for the Sum of Independent Random Variables (Bennett, 1962).

    Example:
        >>> variance_upper(torch.tensor(0.0), torch.tensor(0.5), 1000, 0.05).round(decimals=3)
        tensor(0.0570, dtype=torch.float64)
    """
    nats = log_inverse(delta)
    log_mean = log_mean.double()
    spread = relative_variance.double().clamp(min=1e-30) / num_draws
    bound = torch.as_tensor(num_draws, dtype=spread.dtype, device=spread.device).reciprocal()
    if not sum_dims:
        return log_mean - _log_remainder(_bennett(spread, bound, spread.new_tensor(nats)))
    data = math.prod(spread.shape[-sum_dims:])
    t = _bennett(spread, bound, spread.new_tensor(nats + math.log(2 * data)))
    largest = -_log_remainder(t)
    curvature = torch.where(t < 1, (largest - t) / t.clamp(min=1e-30) ** 2, torch.inf)
    # The series where the difference cancels.
    curvature = torch.where(t < 1e-4, 0.5 + t / 3, curvature)
    shift = _summed(curvature * spread, sum_dims)
    square = _summed(spread / (1 - t).clamp(min=0) ** 2, sum_dims)
    top = largest.flatten(-sum_dims).amax(-1)
    excess = _bennett(square, top, spread.new_tensor(nats + math.log(2)))
    total = _summed(log_mean, sum_dims) + shift + excess
    return torch.where(top.isfinite(), total, torch.inf)


def mean_lower(values: Tensor, variance: Tensor, delta: float) -> Tensor:
    r"""Bound the mean of a quantity from below, given a bound v of its variance.

    Catoni's estimate is the root of :math:`\sum_s\psi(\alpha(y_s-\theta))=0` with
    :math:`\psi(y)=\mathrm{sign}(y)\log(1+|y|+y^2/2)`, which large values move little.  It exceeds the mean by more than
    :math:`t=\sqrt{2vL/(S-2L)}`, :math:`L=\log(1/\delta)`, with a probability of at most :math:`\delta`.

    Args:
        values: S along the first dim.
        variance: v, of the shape without the first dim.
        delta: probability that the bound does not hold, in (0, 1).

    Returns:
        The estimate less t; ``-inf`` where S is at most 2L, or v infinite.

    Raises:
        ValueError: for a ``delta`` outside of (0, 1).

    Reference:
        Challenging the Empirical Mean and Empirical Variance: A Deviation Study (Catoni, 2012), proposition 2.4.

    Example:
        >>> mean_lower(torch.tensor([-1.0, 1.0]).repeat(500), torch.tensor(1.0), 0.05).round(decimals=4)
        tensor(-0.0776, dtype=torch.float64)
    """
    nats, count = log_inverse(delta), len(values)
    values, variance = values.detach().double(), variance.double()
    if count <= 2 * nats:
        return torch.full_like(variance, -torch.inf)
    t = (2 * variance * nats / (count - 2 * nats)).sqrt()
    alpha = (2 * nats / (count * (variance + t**2).clamp(min=1e-300))).sqrt()
    low, high = values.amin(0), values.amax(0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        y = alpha * (values - middle)
        above = (y.sign() * torch.log1p(y.abs() + 0.5 * y**2)).sum(0) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    bound = low - t
    return torch.where(bound.isnan(), -torch.inf, bound)


def relative_variance(log_weights: Tensor) -> Tensor:
    r"""Estimate :math:`\mathrm{Var}(w)/Z^2` from S >= 2 draws along the first dim.

    Example:
        >>> relative_variance(torch.tensor([1.0, 3.0]).log()).round(decimals=4)  # variance 2, mean 2
        tensor(0.5000, dtype=torch.float64)
    """
    count = len(log_weights)
    deviation = torch.expm1(log_weights.double().log_softmax(0) + math.log(count))
    return deviation.square().sum(0) / (count - 1)


def log_inverse(delta: float) -> float:
    """Return log(1/delta).

    Raises:
        ValueError: for a ``delta`` outside of (0, 1).
    """
    if isinstance(delta, bool) or not isinstance(delta, real.Real) or not 0.0 < delta < 1.0:
        raise ValueError(
            f"delta is the probability that a bound does not hold and lies in (0, 1), got {delta}; write 0.05 for an "
            "interval that holds with a probability of 95 %"
        )
    return -math.log(delta)


def _checked(log_weights: Tensor, sum_dims: int = 0) -> Tensor:
    """Return log-weights in float64; refuse those that bound nothing, and more dims of data than they have."""
    if not isinstance(log_weights, Tensor):
        raise TypeError(f"log_weights must be a tensor, got {type(log_weights).__name__}")
    check_count("sum_dims", sum_dims, 0)
    if log_weights.dim() and sum_dims >= log_weights.dim():
        raise ValueError(f"log_weights have {log_weights.dim() - 1} dim(s) after the draws', and sum_dims={sum_dims}")
    if log_weights.dim() == 0 or len(log_weights) == 0:
        raise ValueError(f"log_weights of shape {tuple(log_weights.shape)} have no draws along the first dim")
    check_weights(log_weights)
    return log_weights.detach().double()


def _in_groups(log_weights: Tensor, whole: Tensor, nats: float, sum_dims: int) -> Tensor:
    """Return the larger of the bounds with one average and with each draw as one, each at half of delta."""
    if len(log_weights) == 1:
        return whole - nats
    each = (_summed(log_weights, sum_dims).sum(0) - nats - math.log(2)) / len(log_weights)
    return torch.maximum(each, whole - nats - math.log(2))


def _numbers(draws: int) -> list[int]:
    """Return numbers of groups into which so many draws are divided, about four in each factor of ten or more."""
    root = math.isqrt(draws)
    sizes = sorted({min(root, round(2 ** (k / 2))) for k in range(2 * root.bit_length() + 1)})
    return sorted({*sizes, *(draws // size for size in sizes)})


def group_means(log_weights: Tensor, count: int) -> Tensor:
    """Return the log of the mean weight of ``count`` groups of draws of one size."""
    size = len(log_weights) // count
    groups = log_weights[: count * size].reshape(count, size, *log_weights.shape[1:])
    return groups[:, 0] if size == 1 else log_mean_exp(groups, 1)


def _summed(values: Tensor, dims: int) -> Tensor:
    return values.sum(tuple(range(-dims, 0))) if dims else values


def _binomial_share(count: int, delta: float) -> float:
    """Return the p at which more than half of ``count`` trials succeed with probability ``delta``."""
    low, high = 0.0, 0.5
    terms = [(k, math.comb(count, k)) for k in range((count + 1) // 2, count + 1)]
    for _ in range(60):
        p = 0.5 * (low + high)
        tail = sum(ways * p**k * (1 - p) ** (count - k) for k, ways in terms)
        low, high = (p, high) if tail < delta else (low, p)
    return low


def _bennett(variance: Tensor, bound: Tensor, nats: Tensor) -> Tensor:
    r"""Return the t with :math:`(v/b^2)\,h(tb/v)=` ``nats``: for a sum of variance v of variables below b."""
    variance = variance.clamp(min=1e-300)
    target = (nats * bound**2 / variance).clamp(min=1e-300)
    # Between the root of u^2 / 2 and Bernstein's sum; h is increasing and convex.
    low, high = (2 * target).sqrt(), (2 * target).sqrt() + target
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = torch.special.xlog1py(1 + middle, middle) - middle < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high * variance / bound


def _log_remainder(t: Tensor) -> Tensor:
    """Return log(1 - t), -inf from t = 1 on."""
    return torch.log1p(-t.clamp(max=1.0))
