r"""Pareto-smoothed importance sampling: the weight of the tail, and weights with a smoothed tail.

A generalised Pareto distribution is fitted to the largest weights.  They have finite moments of order below 1/k, for
its shape k.  An importance-sampling estimate from a practical number of draws is reliable for k below 0.7; its variance
is finite for k below 0.5 (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and Gabry, 2024).

Precision.  Everything is computed in float64, relative to the largest weight, whatever the dtype of the log-weights.
Round-off of the log-weights remains: float32 numbers near :math:`10^6` are 1/16 apart, and sums are wrong by a few such
steps.  k-hat is that of the weights with these errors: a tail that spans several nats keeps its shape, and the noise
of an exact guide gives a light tail (k-hat near 0) instead of ``-inf``.
Programs whose log-weights exceed some thousands should run in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_hvae.arguments import check_count
from pyro_hvae.weights.lattice import lattice_khat
from pyro_hvae.weights.means import check_weights, count_draws
from pyro_hvae.weights.tail import (
    LEAST_DRAWS,
    constant_tail,
    excess,
    fit_tail,
    mean_of_ties,
    quadrature_size,
    quantiles,
    tail_size,
    tied_cutoff,
)

__all__ = ["good_khat", "pareto_khat", "psis"]

_ROUND_OFF_UNITS = 64
"""Weights are equal if their logarithms differ by less than so many units in the last place, within these limits."""
_LEAST_ROUND_OFF, _MOST_ROUND_OFF = 1e-8, 0.01
"""Within the larger limit no estimate changes by more than one per cent."""

_CHUNK_BYTES = 2**24
"""Memory of the rows that are fitted at once; larger chunks are slower on a CPU, whose caches they exceed."""


def psis(log_weights: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Smooth the largest weights, normalise, and diagnose.

    The M = min(S/5, :math:`3\sqrt S`) largest weights are replaced by the quantiles of the distribution fitted to them,
    at most the largest weight.  Draws of equal weight share theirs evenly, and weights of zero stay zero.

    Args:
        log_weights: unnormalised, S >= 5 along ``dim``; any other dims are treated one by one.  Gradients are dropped.
        dim: the dim of the draws.

    Returns:
        Normalised log-weights of the same shape (their exponentials sum to one along ``dim``), and k-hat, of the
        shape without ``dim``, both on the device and in the dtype of ``log_weights``.  k-hat is ``-inf`` where all
        weights are the same but for round-off (64 units of the last place, at least 1e-8 and at most 0.01 nats), or
        all of the largest are, or among discrete ones the largest is common; it is ``inf`` where fewer than 25 draws
        have a positive weight, or the others vanish beside the largest in float64.  Weights are smoothed where k-hat
        is finite and ties do not reach from the tail to the weights below it.

    Raises:
        ValueError: for fewer than 5 draws, log-weights that are NaN or +inf, or a column without any positive weight.
        TypeError: for log-weights that are not floating-point numbers.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> smoothed, khat = psis(torch.distributions.Exponential(1 / 0.2).sample((1000,)))
        >>> bool(abs(khat - 0.2) < 0.15), round(float(smoothed.exp().sum()), 6)
        (True, 1.0)
    """
    rows = _rows(log_weights, dim)
    smoothed, khat = torch.empty_like(rows), rows.new_empty(len(rows))
    for part in _parts(rows):
        khat[part] = _fit(rows[part], smoothed[part])
    shape = log_weights.movedim(dim, -1).shape
    return smoothed.reshape(shape).movedim(-1, dim), khat.reshape(shape[:-1])


def pareto_khat(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Compute k-hat of log-weights along ``dim``; see :func:`psis`, whose second result it is.

    Example:
        >>> pareto_khat(torch.zeros(100))
        tensor(-inf)
    """
    rows = _rows(log_weights, dim)
    khat = rows.new_empty(len(rows))
    for part in _parts(rows):
        khat[part] = _fit(rows[part])
    return khat.reshape(log_weights.movedim(dim, -1).shape[:-1])


def good_khat(num_draws: int) -> float:
    r"""Return the largest reliable k-hat of so many draws, :math:`\min(1 - 1/\log_{10} S, 0.7)` (Vehtari et al., 2024).

    Raises:
        ValueError: for fewer than 2 draws.

    Example:
        >>> round(good_khat(100), 2), good_khat(10_000)
        (0.5, 0.7)
    """
    check_count("num_draws", num_draws, 2)
    return min(1 - 1 / math.log10(num_draws), 0.7)


def _rows(log_weights: Tensor, dim: int) -> Tensor:
    """Check log-weights, and reshape them to ``(R, S)``."""
    count = count_draws(log_weights, dim, 1)
    if count < 5:
        raise ValueError(
            f"a tail can't be fitted to {count} draw(s): at least 5 are needed, and some hundreds are wise"
        )
    check_weights(log_weights, dim)
    return log_weights.detach().movedim(dim, -1).reshape(-1, count)


def _parts(rows: Tensor) -> list[slice]:
    """Return slices of rows of bounded memory."""
    draws = rows.shape[-1]
    size = tail_size(draws)
    row_bytes = 8 * (4 * draws + quadrature_size(size) * size)
    step = max(1, _CHUNK_BYTES // row_bytes)
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _fit(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Return k-hat ``(R,)`` of rows ``(R, S)``; write normalised smoothed log-weights to ``out``."""
    top, draws = rows.amax(-1, keepdim=True).double(), rows.shape[-1]
    # In float64 first: the difference of two float32 numbers can need more digits than they have.
    values = rows.double() - top
    unit = torch.finfo(rows.dtype).eps * top[:, 0].abs().clamp(min=1.0)
    round_off = (_ROUND_OFF_UNITS * unit).clamp(_LEAST_ROUND_OFF, _MOST_ROUND_OFF)
    exact = values.amin(-1) > -round_off
    khat = torch.full_like(round_off, torch.inf)
    if draws >= LEAST_DRAWS:
        tail, index = values.topk(tail_size(draws) + 1, -1)
        tail, index = tail.flip(-1), index.flip(-1)
        tied = tied_cutoff(tail) & ~exact
        if bool(tied.any()):  # weights on a lattice are not smoothed
            khat[tied] = lattice_khat(values[tied])
        constant = constant_tail(tail) & ~tied
        khat[constant] = -torch.inf
        fitted = ~(exact | tied | constant)
        _smooth(values, tail, index, fitted, khat, out is not None)
    khat[exact] = -torch.inf
    if out is not None:
        out.copy_(values - values.logsumexp(-1, keepdim=True))
    return khat


def _smooth(values: Tensor, tail: Tensor, index: Tensor, fitted: Tensor, khat: Tensor, write: bool) -> None:
    """Fit the rows ``fitted``; write ``khat`` and, if ``write``, the tails of ``values`` in place."""
    every = bool(fitted.all())
    tail = tail if every else tail[fitted]
    shape, scale = fit_tail(excess(tail))
    failed = ~shape.isfinite()
    khat[fitted] = shape.masked_fill(failed, torch.inf)
    if write:
        new = (tail[:, :1].exp() + quantiles(shape, scale, tail.shape[-1] - 1)).clamp(max=1.0)
        # Draws of equal weight keep equal weights: those equal to the cutoff, weights of zero among them, are not
        # smoothed, and others that are equal share the sum of their quantiles.
        kept = failed[:, None] | (tail[:, 1:] == tail[:, :1])
        new = torch.where(kept, tail[:, 1:], mean_of_ties(tail[:, 1:], new).log())
        if every:
            values.scatter_(-1, index[:, 1:], new)
        else:
            values[fitted] = values[fitted].scatter(-1, index[fitted][:, 1:], new)
