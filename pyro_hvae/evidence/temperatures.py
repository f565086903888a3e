"""Temperatures of annealing: equal steps, dense at the ends, or set by a pilot run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from pyro_hvae.evidence.gibbs import Gibbs
from pyro_hvae.evidence.moves import hamiltonian
from pyro_hvae.evidence.path import Path
from pyro_hvae.weights.means import unchecked_sample_size

__all__ = ["adaptive_temperatures", "sigmoid_temperatures", "temperatures"]


def temperatures(betas: int | str | Sequence[float] | Tensor, num: int = 100) -> Tensor:
    """Check temperatures, or make them: a number of equal steps, ``"linear"`` or ``"sigmoid"`` with ``num`` steps.

    Raises:
        ValueError: for temperatures that do not increase from 0 to 1.

    Example:
        >>> temperatures(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if isinstance(betas, str) and betas in ("linear", "sigmoid"):
        return temperatures(num) if betas == "linear" else sigmoid_temperatures(num)
    if isinstance(betas, Integral):
        if isinstance(betas, bool) or betas < 1:
            raise ValueError(f"the number of temperature steps must be at least 1, got {betas}")
        return torch.linspace(0.0, 1.0, int(betas) + 1, dtype=torch.float64)
    if betas is None or isinstance(betas, (str, float)):
        raise ValueError(f"temperatures are 'linear', 'sigmoid', 'adaptive', an int or a sequence, got {betas!r}")
    checked = torch.as_tensor(betas, dtype=torch.float64)
    increase = checked.dim() == 1 and len(checked) > 1 and bool((checked.diff() > 0).all())  # NaN does not
    if not increase or checked[0] != 0 or checked[-1] != 1:
        raise ValueError(f"temperatures must increase strictly from 0 to 1, got {checked.reshape(-1).tolist()[:8]}")
    return checked


def sigmoid_temperatures(num: int, width: float = 4.0) -> Tensor:
    """Return temperatures that are dense near both ends: a logistic function scaled to [0, 1].

    The logistic function is taken at ``num + 1`` equal points of [-width, width].

    Reference:
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017).

    Example:
        >>> sigmoid_temperatures(2).tolist()
        [0.0, 0.5, 1.0]
    """
    if num < 1:
        raise ValueError(f"the number of temperature steps must be at least 1, got {num}")
    raw = torch.sigmoid(torch.linspace(-width, width, num + 1, dtype=torch.float64))
    return (raw - raw[0]) / (raw[-1] - raw[0])


def adaptive_temperatures(path: Path, *, target: float = 0.9, num_leapfrog: int = 5, max_num: int = 2000) -> Tensor:
    r"""Choose temperatures at which the conditional effective sample size falls by the same factor each step.

    A separate pilot run sets them, by the smallest of the data's ratios.

    Args:
        target: CESS / K of one step, in (0, 1); nearer to one means more temperatures.
        max_num: largest number of temperatures.

    Raises:
        ValueError: for a target outside of (0, 1), or if ``max_num`` temperatures do not suffice.

    Reference:
        Toward Automatic Model Comparison: An Adaptive Sequential Monte Carlo Approach (Zhou, Johansen and Aston,
        2016).
    """
    if not 0.0 < target < 1.0:
        raise ValueError(f"target must lie in (0, 1), got {target}")
    state, gibbs = path.start(), Gibbs(path)
    betas = [0.0]
    log_step: Tensor | None = None
    while betas[-1] < 1.0:
        if len(betas) > max_num:
            raise ValueError(f"{max_num} temperatures do not suffice (beta is {betas[-1]:.3g}): lower the target")
        state = path.replace_dead(state)
        slope = path.difference(state)
        # One synchronisation with the device per temperature.
        betas.append(min(1.0, betas[-1] + float(_largest_step(slope, 1.0 - betas[-1], target))))
        log_step = slope.new_tensor(math.log(0.2)) if log_step is None else log_step
        for _ in range(3 if path.transforms else 0):
            state, accepted = hamiltonian(path, state, betas[-1], log_step.exp(), num_leapfrog)
            log_step = log_step + 0.3 * (accepted.mean() - 0.8)
        state = gibbs(state, betas[-1])
    betas[-1] = 1.0
    return temperatures(betas)


def _largest_step(slope: Tensor, rest: float, target: float) -> Tensor:
    """Return the largest increase of beta, at most ``rest``, that keeps every datum's conditional ESS at the target.

    Args:
        slope: log joint less log base, ``(K, *plates)``.
    """
    low, high = slope.new_zeros(()), slope.new_tensor(rest)
    whole = ~(_conditional_ess(high * slope) < target)
    for _ in range(40):
        middle = 0.5 * (low + high)
        enough = _conditional_ess(middle * slope) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(whole, rest, low.clamp(min=1e-6))


def _conditional_ess(increments: Tensor) -> Tensor:
    """Return the smallest conditional effective sample size over the data, as a fraction of the chains."""
    return (unchecked_sample_size(increments) / len(increments)).min()
