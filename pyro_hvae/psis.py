r"""Pareto-smoothed importance sampling: how heavy the tail of the weights is, and weights with that tail smoothed.

A generalised Pareto distribution is fitted to the largest weights; its shape k tells how many moments they have.
Below 0.7 an importance-sampling estimate from a practical number of draws can be trusted, above it can't; below 0.5
its variance is finite (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry, 2024).

The fit is ArviZ's.  Its function takes log-*likelihoods*, which are minus log-weights; that sign is handled here and
nowhere else.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["EXACT_SPREAD", "good_khat", "pareto_khat", "psis"]

EXACT_SPREAD = 1e-10
"""Log-weights that differ by less are round-off around one value: the guide is the posterior, and k is -inf.

In single precision round-off is larger, and grows with the log-weights: 64 units of their last place are taken for it.
"""


def psis(log_weights: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Smooth the largest weights, normalise, and diagnose.

    Args:
        log_weights: unnormalised, at least 5 along ``dim``; any other dims are treated one by one.
        dim: the dim of the draws.

    Returns:
        Normalised log-weights of the same shape (their exponentials sum to one along ``dim``), and k-hat, of the
        shape without ``dim``: ``-inf`` where all weights are the same, or all of the largest, or among discrete ones
        the largest is common; ``inf`` where there are too few draws to tell.

    Raises:
        ValueError: for fewer than 5 draws, NaN or +inf, or a column without any positive weight.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> smoothed, khat = psis(torch.distributions.Exponential(1 / 0.2).sample((1000,)))
        >>> bool(abs(khat - 0.2) < 0.15), round(float(smoothed.exp().sum()), 6)
        (True, 1.0)
    """
    from arviz_stats.base import array_stats

    weights = log_weights.detach().movedim(dim, -1)
    _check(weights)
    # The fit divides by the spread of the tail, so columns without any are answered beforehand: the weights of
    # discrete draws may share their largest value, which bounds them, and then every moment exists.
    spread = weights.amax(-1) - weights.amin(-1)
    exact = spread < _round_off(weights)
    flat = weights.double().cpu().numpy().reshape(-1, weights.shape[-1])
    smoothed = flat - _logsumexp(flat)
    khat = np.full(len(flat), -np.inf)
    rest = ~exact.cpu().numpy().reshape(-1)
    if rest.any():
        for row in np.flatnonzero(rest):
            if len(flat[row]) < 25:  # ArviZ fits no shape to fewer than 5 draws, the largest fifth of them
                khat[row] = np.inf
            elif _tied_cutoff(flat[row]):  # a lattice, of which smoothing would make something else
                khat[row] = _lattice_khat(flat[row])
            elif not _constant_tail(flat[row]):
                with np.errstate(all="ignore"):  # a tail that underflows gives NaN, which is answered below
                    fitted, shape = array_stats.psislw(-flat[row])
                if np.isnan(shape):  # ArviZ 1.x wants some draws more for a tail
                    khat[row] = np.inf
                else:
                    smoothed[row], khat[row] = fitted, shape
        smoothed -= _logsumexp(smoothed)
    normalised = torch.as_tensor(smoothed).to(log_weights).reshape(weights.shape)
    return normalised.movedim(-1, dim), torch.as_tensor(khat).to(log_weights).reshape(spread.shape)


def pareto_khat(log_weights: Tensor, dim: int = 0) -> Tensor:
    """k-hat of log-weights along ``dim``; see :func:`psis`.

    Example:
        >>> pareto_khat(torch.zeros(100))
        tensor(-inf)
    """
    return psis(log_weights, dim)[1]


def good_khat(num_draws: int) -> float:
    r"""The largest k-hat that so many draws make reliable, :math:`\min(1 - 1/\log_{10} S, 0.7)` (Vehtari et al., 2024).

    Raises:
        ValueError: for fewer than 2 draws.

    Example:
        >>> round(good_khat(100), 2), good_khat(10_000)
        (0.5, 0.7)
    """
    if num_draws < 2:
        raise ValueError(f"need at least 2 draws, got {num_draws}")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def _check(weights: Tensor) -> None:
    if weights.dim() == 0 or weights.shape[-1] < 5:
        count = weights.shape[-1] if weights.dim() else 1
        raise ValueError(
            f"a tail can't be fitted to {count} draw(s): at least 5 are needed, and some hundreds are wise"
        )
    bad = torch.isnan(weights) | (weights == torch.inf)
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{int(bad.sum())} log-weights are NaN or +inf; the first has index {first} (draws last)")
    empty = (weights == -torch.inf).all(-1)
    if bool(empty.any()):
        raise ValueError(f"{int(empty.sum())} column(s) have no draw with a positive weight: every log-weight is -inf")


def _round_off(weights: Tensor) -> Tensor:
    """By how much equal log-weights may differ; of each column."""
    size = weights.abs().masked_fill(weights.isinf(), 0.0).amax(-1).clamp(min=1.0)
    return (64 * torch.finfo(weights.dtype).eps * size).clamp(min=EXACT_SPREAD)


def _tail_size(row: np.ndarray) -> int:
    """How many of the largest weights the fit looks at (Vehtari et al., 2024)."""
    return int(min(len(row) / 5, 3 * np.sqrt(len(row))))


def _constant_tail(row: np.ndarray) -> bool:
    """Whether the draws that the fit would take for the tail all have the same weight."""
    tail = np.sort(row)[-_tail_size(row) :]
    return bool(tail[-1] - tail[0] < EXACT_SPREAD)


def _tied_cutoff(row: np.ndarray) -> bool:
    """Whether a quarter of the tail is no larger than the largest weight below it, on which the fit would divide by 0.

    That is so for the weights of discrete draws, where most weights are zero, and where they underflow.
    """
    ordered, size = np.sort(row), _tail_size(row)
    quarter, cutoff = ordered[-size + int(size / 4 + 0.5) - 1], ordered[-size - 1]
    return bool(quarter <= cutoff + EXACT_SPREAD or np.exp(quarter - row.max()) == np.exp(cutoff - row.max()))


def _lattice_khat(row: np.ndarray) -> float:
    """k-hat of weights with ties: without zeros, and spread evenly from each value down to the next.

    A power law on a lattice is one between its points as well, so the spread keeps its power.  A largest value that
    came ten times is taken for a bound, which has every moment.
    """
    from arviz_stats.base import array_stats

    row = row[row > -np.inf]
    if len(row) < 25:
        return np.inf
    if _constant_tail(row) or np.count_nonzero(row > row.max() - EXACT_SPREAD) >= 10:
        return -np.inf
    if _tied_cutoff(row):
        ordered = np.sort(row)
        first = np.concatenate([[True], np.diff(ordered) > EXACT_SPREAD])
        group = np.cumsum(first) - 1
        gaps = np.diff(ordered[first])
        if np.exp(ordered[first][-2] - ordered[-1]) == 0:
            return np.inf  # next to the largest weight all others vanish
        count = np.bincount(group)
        place = (np.arange(len(ordered)) - np.flatnonzero(first)[group] + 0.5) / count[group]
        row = ordered - np.concatenate([gaps[:1], gaps])[group] * (1 - place)
    return float(array_stats.psislw(-row)[1])


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(-1, keepdims=True))
