r"""The mean of the weights, its error, and checks.

.. math:: \widehat{\log p(x)} = \log\frac1S\sum_s w_s, \qquad
          \mathrm{stderr} = \frac{\mathrm{sd}(w)}{\sqrt S\,\bar w}, \qquad
          \mathrm{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2}.

All results are computed relative to the largest weight, so large log-weights do not overflow.  Many data are taken in
blocks, whose intermediate tensors are small beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hvae import devices
from pyro_hvae.arguments import check_count

__all__ = [
    "check_weights",
    "count_draws",
    "effective_sample_size",
    "log_mean_exp",
    "log_mean_exp_stderr",
    "unchecked_sample_size",
]

_BLOCK = 4_000_000
"""Weights of one block."""


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Compute :math:`\log\frac1S\sum_s w_s` (nats): the importance-sampling estimate of log p(x).

    Args:
        log_weights: :math:`\log w_s`, S along ``dim``; ``-inf`` is a weight of zero.
        dim: the dim of the draws.

    Returns:
        The shape without ``dim``; ``-inf`` where all weights are zero, NaN or +inf where a log-weight is.

    Raises:
        ValueError: if there are no draws.

    Example:
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log()).exp().round(decimals=4)
        tensor(2.)
    """
    count = count_draws(log_weights, dim, 1)
    return _in_blocks(torch.logsumexp, log_weights, dim) - math.log(count)


def log_mean_exp_stderr(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Compute the standard error of :func:`log_mean_exp` by the delta method, :math:`\mathrm{sd}(w)/(\sqrt S\bar w)`.

    It is meaningful where :func:`pareto_khat` is below :func:`good_khat`.

    Args:
        log_weights: independent draws, S >= 2 along ``dim``.
        dim: the dim of the draws.

    Returns:
        The shape without ``dim``, in nats; NaN where all weights are zero.

    Raises:
        ValueError: for fewer than 2 draws, or log-weights that are NaN or +inf.

    Example:
        >>> log_mean_exp_stderr(torch.tensor([1.0, 3.0]).log()).round(decimals=4)  # sd 2**.5, mean 2
        tensor(0.5000)
    """
    count = count_draws(log_weights, dim, 2)
    _refuse_invalid(log_weights, dim)

    def error(weights: Tensor, dim: int) -> Tensor:
        deviation = torch.expm1(weights.log_softmax(dim) + math.log(count))  # of w / mean(w) from 1
        return (deviation.square().sum(dim) / (count * (count - 1))).sqrt()

    return _in_blocks(error, log_weights, dim)


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Compute :math:`(\sum_s w_s)^2/\sum_s w_s^2`, a number between 1 (one weight dominates) and S (all are equal).

    Args:
        log_weights: S along ``dim``, normalised or not.
        dim: the dim of the draws.

    Returns:
        The shape without ``dim``; NaN where all weights are zero.

    Raises:
        ValueError: if there are no draws, or log-weights are NaN or +inf.

    Reference:
        Sequential Imputations and Bayesian Missing Data Problems (Kong, Liu and Wong, 1994).

    Example:
        >>> effective_sample_size(torch.zeros(10))
        tensor(10.)
    """
    count_draws(log_weights, dim, 1)
    _refuse_invalid(log_weights, dim)
    return unchecked_sample_size(log_weights, dim)


def unchecked_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Compute :func:`effective_sample_size` without a look at values, for steps that must not wait for a device."""

    def size(weights: Tensor, dim: int) -> Tensor:
        return (-(2 * weights.log_softmax(dim)).logsumexp(dim)).exp().clamp(1.0, weights.shape[dim])

    return _in_blocks(size, log_weights, dim)


def _in_blocks(statistic: Callable[[Tensor, int], Tensor], log_weights: Tensor, dim: int) -> Tensor:
    """Return a statistic of each datum's weights."""
    if log_weights.numel() <= _BLOCK or log_weights.dim() < 2:
        return statistic(log_weights, dim)
    draws_first = log_weights.movedim(dim, 0)
    blocks = draws_first.flatten(1).split(max(1, _BLOCK // len(draws_first)), 1)
    return torch.cat([statistic(block, 0) for block in blocks]).reshape(draws_first.shape[1:])


def check_weights(log_weights: Tensor, dim: int = 0) -> None:
    """Refuse log-weights that are NaN or +inf, and data for which no draw has a positive weight.

    Args:
        log_weights: draws along ``dim``; the other dims are data.
        dim: the dim of the draws.

    Raises:
        ValueError: with the number of such data, and the index of the first.

    Example:
        >>> check_weights(torch.tensor([[0.0, 0.0], [1.0, torch.nan]]))
        Traceback (most recent call last):
        ValueError: 1 of 2 data have a log-weight that is NaN or +inf (an improper posterior, or a density without a
        bound); the first has index (1,), at draw 1
    """
    count_draws(log_weights, dim, 1)
    top = log_weights.amax(dim)  # NaN if any is
    for bad, what in (
        (
            top.isnan() | (top == torch.inf),
            "a log-weight that is NaN or +inf (an improper posterior, or a density without a bound)",
        ),
        (top == -torch.inf, "no draw with a positive weight (log p(x, z) is -inf at every draw)"),
    ):
        if bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            where = f"; the first has index {first}" if first else ""
            draws = log_weights.movedim(dim, -1)[first]
            invalid = (draws.isnan() | (draws == torch.inf)).nonzero()
            if len(invalid):
                where += f"{',' if where else ';'} at draw {int(invalid[0])}"
            who = f"{int(bad.sum())} of {bad.numel()} data have" if bad.dim() else "the whole posterior has"
            raise ValueError(f"{who} {what}{where}")


def _refuse_invalid(log_weights: Tensor, dim: int) -> None:
    """Refuse log-weights that are no logarithms, NaN or +inf."""
    invalid = log_weights.isnan() | (log_weights == torch.inf)
    if devices.has_values(log_weights) and bool(invalid.any()):
        first = tuple(int(i) for i in invalid.nonzero()[0])
        raise ValueError(
            f"{int(invalid.sum())} of {log_weights.numel()} log-weights are NaN or +inf; the first has index {first}: "
            "a density without a bound, or a draw outside of its support; check_weights names such data"
        )


def count_draws(log_weights: Tensor, dim: int, least: int) -> int:
    """Return the number of draws; refuse too few."""
    if not isinstance(log_weights, Tensor):
        raise TypeError(f"log_weights must be a tensor, got {type(log_weights).__name__}")
    if not log_weights.is_floating_point():
        raise TypeError(f"log_weights are {log_weights.dtype}; give floating-point numbers, log_weights.double()")
    check_count("dim", dim, -log_weights.dim())
    if log_weights.dim() and dim >= log_weights.dim():
        raise ValueError(f"dim must be below {log_weights.dim()}, the number of dims of log_weights, got {dim}")
    count = log_weights.shape[dim] if log_weights.dim() else 0
    if count < least:
        raise ValueError(
            f"log_weights of shape {tuple(log_weights.shape)} have {count} draw(s) along dim {dim}; "
            f"at least {least} are needed"
        )
    return count
